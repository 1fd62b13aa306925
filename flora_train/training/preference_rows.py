"""The rows of preferences: of a draw for training, and of held-out examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Row
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit

RowKey: TypeAlias = tuple[str, int, int, int]
"""(task, adapter, example, part) of a held-out row."""
CHOSEN, REJECTED, KL = range(3)
"""Parts of a preference: the chosen or only completion, the rejected one, and the row of the KL term."""


def part_of(row: Row) -> int:
    """The part of its example that a row stands for."""
    return row.document if row.completion_of is None else KL


def row_key(row: Row) -> RowKey:
    """What identifies a row among held-out rows."""
    return row.task, row.adapter, row.example, part_of(row)


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

    def _labelled(self, adapter: int, examples: Sequence[int], unit: int, *, in_batch: bool) -> Iterator[Row]:
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
            if preference.is_supervised:
                continue
            if split.is_paired:
                rows.append(Row(contender, task, example, split.size(example, 1), document=1))
            else:
                partner = split.partner(example)
                length = split.size(example, completion_of=partner)
                rows.append(Row(contender, task, example, length, completion_of=partner))
    return rows
