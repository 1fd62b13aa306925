"""Rows that belong to members of a gate: a column names the member of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.json_format import JsonObject
from flora_train.config.member_schema import member_name
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedExample, LocatedRow, RowEncoder, RowsOutline


class MemberRowEncoder:
    """Encodes rows as `inner` does; the target of an example is the number of its member in
    `task.task_members`.

    rows: the training rows. Raises UserError if the column is missing.
    """

    def __init__(self, inner: RowEncoder, task: TaskConfig, *, rows: RowsOutline, key: str) -> None:
        assert task.task_id is not None
        self.inner, self.column, self.key = inner, task.task_id, key
        self.numbers = {name: number for number, name in enumerate(task.task_members or ())}
        self._check_column(rows, "training")

    @property
    def setting(self) -> JsonObject:
        return {"rows": self.inner.setting, "task_id": self.column, "members": list(self.numbers)}

    def check(self, rows: RowsOutline, split: str) -> None:
        self.inner.check(rows, split)
        self._check_column(rows, split)

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        numbers = [self._number(row) for row in rows]
        for number, example in zip(numbers, self.inner.encode(rows), strict=True):
            yield replace(example, target=(float(number),))

    def _check_column(self, rows: RowsOutline, split: str) -> None:
        if rows.first is not None and self.column not in rows.columns:
            hint = (
                f"is no column of the {split} rows ({rows.first.where}), which have {choices(rows.columns)}."
            )
            hint += did_you_mean(self.column, rows.columns)
            raise user_error(f"{self.key}.task_id", self.column, hint)

    def _number(self, row: LocatedRow) -> int:
        value = row.cells.get(self.column)
        number = self.numbers.get(str(value))
        if number is None:
            hint = f"of column {self.column} ({row.where}) is no member of the gate; they are "
            hint += f"{choices(self.numbers)}.{did_you_mean(str(value), self.numbers)}"
            raise user_error(f"{self.key}.task_id", value, hint)
        return number


def with_members(name: str, task: TaskConfig, adapters: Mapping[str, AdapterConfig]) -> TaskConfig:
    """A task with the names that its task_id may have: the members that every gate of the task has.

    Raises UserError where gates of the task have no member in common.
    """
    if task.task_id is None:
        return task
    names: list[str] | None = None
    for adapter in adapters.values():
        if adapter.method != "meteora" or (adapter.tasks is not None and name not in adapter.tasks):
            continue
        members = [member_name(source) for source in adapter.over or ()]
        names = members if names is None else [member for member in names if member in members]
    if not names:
        hint = "cannot name a member: the adapters of method meteora of this task have none in common"
        raise user_error(f"tasks.{name}.task_id", task.task_id, hint)
    return task.model_copy(update={"task_members": sorted(names)})
