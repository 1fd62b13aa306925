"""The rows of preferences: of a draw for training, and of held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.config.errors import Problem
from flora_train.data.batch import Row
from flora_train.data.preferences.preference import BATCH, Preference
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task


def reads_cache(preference: Preference, spec: AdapterSpec) -> bool:
    """Whether an adapter's reference was computed before training: its initial state, or a cached base."""
    return preference.has_reference and (preference.reference != BATCH or spec.init_from is not None)


@dataclass(frozen=True)
class RowCosts:
    """Tokens of the rows of every training example, as the mixture counts them."""

    lengths: NDArray[np.int64]
    """[n], for each adapter."""
    shared: NDArray[np.int64] | None = None
    """[n], for all adapters together: rows of the base."""


def row_costs(task: Task, specs: Sequence[AdapterSpec]) -> RowCosts:
    """The costs of a task's examples for its adapters. The rows of the KL term of a draw have no more tokens
    than the draw's own rows, of which they are a permutation.
    """
    preference, split = task.preference, task.train
    if preference is None or not isinstance(split, PreferenceSplit):
        return RowCosts(split.lengths)
    if preference.is_supervised:
        return RowCosts(np.diff(split.offsets)[split.pack_offsets[:-1]])
    own = shared = split.lengths
    uses_cache = [reads_cache(preference, spec) for spec in specs]
    if preference.objective == "kto":
        drawn = split.lengths
        if any(uses_cache):
            drawn = np.maximum(drawn, split.kl_lengths)
        own, shared = own + drawn, 2 * shared
    if not preference.has_reference or all(uses_cache):
        return RowCosts(own)
    return RowCosts(own, shared)


def largest_unit(task: Task, specs: Sequence[AdapterSpec], examples_per_draw: int) -> int:
    """Padded tokens of the largest rows that a loss of this task couples, with those of the reference; 0
    where it couples none."""
    preference, split = task.preference, task.train
    if preference is None or preference.is_supervised or not isinstance(split, PreferenceSplit):
        return 0
    rows = 2
    if preference.objective == "kto":
        rows *= examples_per_draw
    if preference.has_reference and not all(reads_cache(preference, spec) for spec in specs):
        rows *= 2
    return rows * split.longest_row


def unit_problem(
    task: Task, specs: Sequence[AdapterSpec], examples_per_draw: int, tokens_per_microbatch: int
) -> Problem | None:
    """The problem if rows that a loss couples do not fit into one micro-batch, or None."""
    needed = largest_unit(task, specs, examples_per_draw)
    if needed <= tokens_per_microbatch:
        return None
    unit, remedy = "a pair", "shorten training.max_length"
    if task.preference is not None and task.preference.objective == "kto":
        unit, remedy = f"a draw of {examples_per_draw} examples", "lower mixture.examples_per_draw"
    hint = (
        f"cannot hold {unit} of task {task.name!r} with its reference, which its loss compares in one "
        f"micro-batch: raise it to {needed}, or {remedy}"
    )
    return Problem("training.tokens_per_microbatch", tokens_per_microbatch, hint)


@dataclass
class DrawRows:
    """Makes the rows of one draw of a preference task."""

    task: str
    preference: Preference
    split: PreferenceSplit

    def rows(
        self,
        examples: Sequence[int],
        adapters: Sequence[int],
        *,
        cached: Sequence[int],
        first_unit: int,
    ) -> Iterator[Row]:
        """Rows of `adapters`, compared with rows of the base, and of `cached`, compared with numbers that
        were computed before. Units are numbered from first_unit on; see `units` for how many.
        """
        if self.preference.is_supervised:
            for example in examples:
                for adapter in (*adapters, *cached):
                    yield self._row(adapter, example)
            return
        half = self.units(len(examples)) // 2
        for group, unit in ((adapters, first_unit), (cached, first_unit + half)):
            in_batch = group is adapters
            ids: Sequence[int] = group
            if ids and in_batch and self.preference.has_reference:
                ids = (BASE_ID, *group)
            for adapter in ids:
                if self.preference.objective == "kto":
                    yield from self._labelled(adapter, examples, unit, in_batch=in_batch)
                else:
                    yield from self._pairs(adapter, examples, unit)

    def units(self, examples: int) -> int:
        """How many unit numbers a draw of this many examples takes."""
        return 2 if self.preference.objective == "kto" else 2 * examples

    def _pairs(self, adapter: int, examples: Sequence[int], first_unit: int) -> Iterator[Row]:
        for unit, example in enumerate(examples, first_unit):
            for document in (0, 1):
                yield self._row(adapter, example, document, unit=unit, frozen=adapter == BASE_ID)

    def _labelled(
        self, adapter: int, examples: Sequence[int], unit: int, *, in_batch: bool
    ) -> Iterator[Row]:
        for i, example in enumerate(examples):
            partner = examples[i - 1]
            if not in_batch:
                partner = self.split.partner(example)
            yield self._row(adapter, example, unit=unit, frozen=adapter == BASE_ID)
            yield self._row(adapter, example, unit=unit, frozen=True, completion_of=partner)

    def _row(
        self,
        adapter: int,
        example: int,
        document: int = 0,
        *,
        unit: int | None = None,
        frozen: bool = False,
        completion_of: int | None = None,
    ) -> Row:
        return Row(
            adapter,
            self.task,
            example,
            self.split.size(example, document, completion_of),
            document=document,
            unit=unit,
            frozen=frozen,
            completion_of=completion_of,
        )


def heldout_preference_rows(
    task: str, preference: Preference, split: PreferenceSplit, contenders: Sequence[int], examples: int
) -> list[Row]:
    """Rows of the first held-out examples for each of these contenders: both completions of a pair, or the
    completion and the one of the KL term.
    """
    rows = []
    for example in range(examples):
        for contender in contenders:
            rows.append(Row(contender, task, example, split.size(example)))
            if split.is_paired:
                rows.append(Row(contender, task, example, split.size(example, 1), document=1))
            elif preference.objective == "kto":
                partner = split.partner(example)
                length = split.size(example, completion_of=partner)
                rows.append(Row(contender, task, example, length, completion_of=partner))
    return rows
