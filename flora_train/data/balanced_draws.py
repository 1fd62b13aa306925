"""Whether a draw, within which the load of a router is balanced, fits into a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping

from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.errors import Problem
from flora_train.data.token_split import TokenSplit


def balance_problem(
    task: str,
    train: TokenSplit,
    adapters: Mapping[str, AdapterConfig],
    *,
    examples: int,
    tokens_per_microbatch: int,
) -> Problem | None:
    """The problem of a task whose draws do not fit into a micro-batch, although an adapter balances the load
    of its experts within them.

    adapters: those that learn the task; examples: per draw.
    """
    family = next((name for name, adapter in adapters.items() if adapter.balances_load), None)
    largest = examples * int(train.lengths.max(initial=0))
    if family is None or largest <= tokens_per_microbatch:
        return None
    hint = (
        f"cannot hold a draw of {examples} examples of task {task!r}, within which adapters.{family} "
        f"balances the load of its experts: raise it to {largest}, lower mixture.examples_per_draw or "
        f"training.max_length, or set adapters.{family}.balance_loss=0"
    )
    return Problem("training.tokens_per_microbatch", tokens_per_microbatch, hint)
