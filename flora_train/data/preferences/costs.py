"""What the rows of preferences cost, and whether rows that a loss couples fit into a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import Problem
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.token_split import TokenSplit


@dataclass(frozen=True)
class RowCosts:
    """Tokens of the rows of every training example, as the mixture counts them."""

    lengths: NDArray[np.int64]
    """[n], for each adapter."""
    shared: NDArray[np.int64] | None = None
    """[n], for all adapters together: rows of the base."""

    def of(self, adapters: int) -> NDArray[np.int64]:
        """[n], for this many adapters."""
        tokens = self.lengths * adapters
        return tokens if self.shared is None else tokens + self.shared


def row_costs(split: TokenSplit, preference: Preference | None, cached: Sequence[bool]) -> RowCosts:
    """The costs of a task's examples. cached: of each adapter, whether its reference was computed before.

    The rows of the KL term of a draw have no more tokens than the draw's own rows, of which they are a
    permutation.
    """
    if preference is None or not isinstance(split, PreferenceSplit):
        return RowCosts(split.lengths)
    if preference.is_supervised:
        return RowCosts(np.diff(split.offsets)[split.pack_offsets[:-1]])
    own = shared = split.lengths
    if preference.objective == "kto":
        drawn = split.lengths
        if any(cached):
            drawn = np.maximum(drawn, split.kl_lengths)
        own, shared = own + drawn, 2 * shared
    if not preference.has_reference or all(cached):
        return RowCosts(own)
    return RowCosts(own, shared)


def largest_unit(
    split: TokenSplit, preference: Preference | None, cached: Sequence[bool], examples_per_draw: int
) -> int:
    """Padded tokens of the largest rows that a loss couples, with those of the reference; 0 where it couples
    none."""
    if preference is None or preference.is_supervised or not isinstance(split, PreferenceSplit):
        return 0
    rows = 2
    if preference.objective == "kto":
        rows *= examples_per_draw
    if preference.has_reference and not all(cached):
        rows *= 2
    return rows * split.longest_row


def unit_problem(
    task: str, preference: Preference | None, largest: int, *, examples: int, tokens_per_microbatch: int
) -> Problem | None:
    """The problem if rows that a loss couples do not fit into one micro-batch, or None. largest: see
    `largest_unit`; examples: per draw.
    """
    if largest <= tokens_per_microbatch or preference is None:
        return None
    unit, remedy = "a pair", "shorten training.max_length"
    if preference.objective == "kto":
        unit, remedy = f"a draw of {examples} examples", "lower mixture.examples_per_draw"
    hint = (
        f"cannot hold {unit} of task {task!r} with its reference, which its loss compares in one "
        f"micro-batch: raise it to {largest}, or {remedy}"
    )
    return Problem("training.tokens_per_microbatch", tokens_per_microbatch, hint)
