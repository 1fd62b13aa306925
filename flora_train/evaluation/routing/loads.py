"""Counts which experts the routers of routed adapters choose on held-out texts.

The texts are read again for it, and not only while losses are evaluated: an evaluation that is resumed has
the losses of some batches from its journal, and would miss their choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.methods.meteora import GATE
from flora_train.adapters.methods.routed import ROUTER
from flora_train.adapters.spec import AdapterSpec
from flora_train.data.batch import Collate
from flora_train.data.task import Task
from flora_train.evaluation.routing.load_types import ExpertLoad, LayerLoad
from flora_train.runtime.distributed import sum_over_processes
from flora_train.training.heldout import evaluate_heldout
from flora_train.training.loss import RowLosses

MAX_EXAMPLES = 128
"""Held-out examples of each task that are read."""


@dataclass
class _Counts:
    """Sums over the tokens that one router read."""

    chosen: Tensor
    """float64 [E]: choices of each expert."""
    entropy: Tensor
    """float64 [], summed over tokens."""
    tokens: Tensor
    """float64 []."""


class LoadRecorder:
    """A recorder of a bank (`BatchRouting.recorder`) that counts choices."""

    def __init__(self, bank: AdapterBank) -> None:
        self.counts: dict[tuple[str, str], _Counts] = {}
        """(adapter, module of the router) -> its sums; the same keys on every process."""
        for pool, member in bank.location:
            spec = pool.specs[member]
            for module, layout in pool.layout.items():
                for router in (ROUTER, GATE):
                    if spec.is_routed and router in layout:
                        _, (experts, _) = layout[router]
                        self.counts[spec.name, module] = _empty(experts, bank.device)

    def add(self, spec: AdapterSpec, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
        """Add the choices [T, k] and the probabilities [T, E] of some tokens."""
        counts = self.counts[spec.name, module]
        used = experts[experts >= 0]
        counts.chosen += torch.bincount(used.flatten(), minlength=len(counts.chosen)).double()
        counts.entropy += torch.special.entr(probabilities.double()).sum()
        counts.tokens += len(experts)

    def sum_over_processes(self) -> None:
        """Add up the counts of all processes. Collective."""
        for counts in self.counts.values():
            for tensor in (counts.chosen, counts.entropy, counts.tokens):
                sum_over_processes(tensor)


def _empty(experts: int, device: torch.device) -> _Counts:
    chosen = torch.zeros(experts, dtype=torch.float64, device=device)
    return _Counts(chosen, chosen.new_zeros(()), chosen.new_zeros(()))


def expert_loads(
    row_losses: RowLosses,
    bank: AdapterBank,
    tasks: Mapping[str, Task],
    *,
    max_tokens: int,
    pad_token: int,
    collate: Collate,
) -> list[ExpertLoad]:
    """The load of the experts of every routed adapter on the first held-out examples of its task.

    max_tokens: padded tokens of a forward pass. The numbers depend on the adapters and texts alone.
    Collective. Afterwards the model is routed to the plain base.
    """
    routed = [i for i, spec in enumerate(bank.specs) if spec.is_routed]
    recorder = LoadRecorder(bank)
    if not recorder.counts:
        return []
    bank.router.recorder = recorder
    try:
        evaluate_heldout(
            row_losses,
            bank,
            _own_tasks(bank, routed, tasks),
            max_tokens=max_tokens,
            pad_token=pad_token,
            max_examples=MAX_EXAMPLES,
            with_test=True,
            collate=collate,
            absent=set(range(len(bank.specs))) - set(routed),
        )
    finally:
        bank.router.recorder = None
    recorder.sum_over_processes()
    return [load for i in routed if (load := _load(bank.specs[i], recorder, tasks)) is not None]


def _own_tasks(bank: AdapterBank, adapters: Iterable[int], tasks: Mapping[str, Task]) -> list[Task]:
    names = dict.fromkeys(bank.specs[adapter].task for adapter in adapters)
    return [tasks[name] for name in names if name in tasks]


def _load(spec: AdapterSpec, recorder: LoadRecorder, tasks: Mapping[str, Task]) -> ExpertLoad | None:
    """The load of one adapter; None if its routers read no token."""
    layers = []
    tokens = 0
    for (adapter, module), counts in recorder.counts.items():
        if adapter != spec.name or not counts.tokens:
            continue
        tokens = max(tokens, int(counts.tokens))
        shares = (counts.chosen / counts.chosen.sum()).tolist()
        layers.append(LayerLoad(module=module, shares=shares, entropy=float(counts.entropy / counts.tokens)))
    if not layers or spec.task not in tasks:
        return None
    examples = min(MAX_EXAMPLES, len(tasks[spec.task].validation))
    rule = spec.experts or spec.gate
    top_k = 1 if rule is None else rule.top_k
    return ExpertLoad(
        adapter=spec.name, task=spec.task, examples=examples, tokens=tokens, top_k=top_k, layers=layers
    )
