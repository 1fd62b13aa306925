"""Tasks that are made of the values of a column (tasks.NAME.split_by), and the rows of each."""

from __future__ import annotations

import logging
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.documents import LocatedRow, outline
from flora_train.data.sources import located_rows, source_files
from flora_train.data.templates import cell_text

MOST_TASKS = 10_000
"""Largest number of tasks from one split_by."""
LONGEST_PART = 64
"""Characters of a value that its task's name has."""
SPELLED = {"+": "p", "#": "sharp", "&": "and", "%": "percent"}
"""Characters that distinguish values such as C, C++ and C#, with their spelling in names."""

MOST_SOURCES = 8
"""Sources whose rows are cached until all tasks are loaded."""
_read: dict[tuple[object, ...], dict[str, list[LocatedRow]]] = {}

logger = logging.getLogger(__name__)


def expand_split_tasks(config: RunConfig) -> RunConfig:
    """The configuration with one task for each value of every split_by column, in place of the tasks that
    have one.

    Raises UserError where the column is missing, has empty cells or too many values, or a value has too few
    rows.
    """
    made = {name: _made_tasks(name, task) for name, task in config.tasks.items() if task.is_split}
    if not made:
        return config
    raw = config.model_dump(mode="json")
    tasks: dict[str, Any] = {}
    for name, task in raw["tasks"].items():
        if name not in made:
            tasks[name] = task
            continue
        for made_name, value in made[name].items():
            if made_name in tasks or made_name in config.tasks:
                hint = f"makes the task {made_name}, whose name another task has: rename one of them"
                raise user_error(f"tasks.{name}.split_by", config.tasks[name].split_by, hint)
            tasks[made_name] = _with_value(task, value)
    adapters = {
        name: {**adapter, "tasks": _chosen(adapter["tasks"], made)}
        for name, adapter in raw["adapters"].items()
    }
    return validate({**raw, "tasks": tasks, "adapters": adapters})


def task_rows(task: TaskConfig, split: str, key: str) -> list[LocatedRow]:
    """The rows of a split ("train", "validation" or "test") of a task; `key` is the task's configuration key.

    Raises UserError as `located_rows` does, and where a task of one value has no row.
    """
    source: SourceConfig = getattr(task, split)
    if task.split_by is None:
        return list(located_rows(source, f"{key}.{split}"))
    by_value = _rows_by_value(source, task.split_by, key, split)
    rows = by_value.get(str(task.split_value), [])
    if not rows:
        hint = f"is in no row of {key}.{split}; values of {task.split_by} are {choices(by_value)}"
        raise user_error(f"{key}.split_value", task.split_value, hint)
    return rows


def forget_rows() -> None:
    """Free the rows that are cached so that the tasks of one source read it once."""
    _read.clear()


def _made_tasks(name: str, task: TaskConfig) -> dict[str, str]:
    """Name -> value of the tasks that a split_by makes, in the order of the values."""
    key, column = f"tasks.{name}", str(task.split_by)
    train = _rows_by_value(task.train, column, key, "train")
    if len(train) > MOST_TASKS:
        hint = f"has {len(train):,} different values, which would be tasks: at most {MOST_TASKS:,} are made"
        raise user_error(f"{key}.split_by", column, hint)
    single = [value for value, rows in train.items() if len(rows) < 2]
    if task.validation is None and single:
        hint = (
            f"has {len(single):,} value(s) with one row, {single[0]!r} for example, so that none can be held "
            "out: give a validation source, or more rows"
        )
        raise user_error(f"{key}.split_by", column, hint)
    for split in ("validation", "test"):
        source: SourceConfig | None = getattr(task, split)
        missing = (
            train.keys() - _rows_by_value(source, column, key, split).keys() if source is not None else ()
        )
        if missing:
            hint = f"has the value {min(missing)!r} in train and not in {split}: give rows of every value"
            raise user_error(f"{key}.split_by", column, hint)
    names = {f"{name}_{part}": value for value, part in _name_parts(sorted(train)).items()}
    logger.info("tasks.%s.split_by makes %s tasks: %s", name, f"{len(names):,}", choices(names))
    return names


def _with_value(task: Mapping[str, Any], value: str) -> dict[str, Any]:
    """A task (as plain mappings) for one value, which `{value}` stands for in its languages."""
    filled = {**task, "split_value": value}
    if task["language"] is not None:
        filled["language"] = task["language"].replace("{value}", value)
    if task["speech"] is not None:
        speech = task["speech"]
        texts = {
            key: speech[key].replace("{value}", value)
            for key in ("language", "token")
            if speech[key] is not None
        }
        filled["speech"] = {**speech, **texts}
    return filled


def _chosen(tasks: Sequence[str] | None, made: Mapping[str, Mapping[str, str]]) -> list[str] | None:
    """The tasks of an adapter, with the tasks made by split_by in place of the task that has it."""
    if tasks is None:
        return None
    chosen: list[str] = []
    for task in tasks:
        chosen += made.get(task, [task])
    return list(dict.fromkeys(chosen))


def _name_parts(values: Sequence[str]) -> dict[str, str]:
    """Value -> its part of a task's name: letters, digits, _ and -, different for every value whatever the
    file system."""
    parts = {value: _sanitized(value) for value in values}
    uses = Counter(part.lower() for part in parts.values())
    for value, part in parts.items():
        if not part or uses[part.lower()] > 1 or len(part) > LONGEST_PART:
            checksum = f"{zlib.crc32(value.encode()):08x}"
            parts[value] = f"{part[:LONGEST_PART]}_{checksum}".lstrip("_")
    return parts


def _sanitized(value: str) -> str:
    """A value without accents, special characters spelled out or replaced by _."""
    spelled = "".join(SPELLED.get(character, character) for character in value)
    plain = unicodedata.normalize("NFKD", spelled).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9-]+", "_", plain).strip("_-")


def _rows_by_value(source: SourceConfig, column: str, key: str, split: str) -> Mapping[str, list[LocatedRow]]:
    """Value -> the rows of a source that have it in `column`, in their order. Read once for all tasks of the
    source."""
    files = source_files(source, f"{key}.{split}")
    content = (source.model_dump_json(), column, *(_stamp(path) for path in files))
    if content not in _read:
        if len(_read) >= MOST_SOURCES:
            _read.clear()
        _read[content] = _group(
            list(located_rows(source, f"{key}.{split}")), column, f"{key}.split_by", split
        )
    return _read[content]


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


def _group(rows: Sequence[LocatedRow], column: str, key: str, split: str) -> dict[str, list[LocatedRow]]:
    by_value: dict[str, list[LocatedRow]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            value = cell_text(row.cells.get(column)).strip()
        except ValueError as error:
            raise user_error(key, column, f"row {number} of {split} {error}") from None
        by_value.setdefault(value, []).append(row)
    empty = len(by_value.get("", ()))
    if empty == len(rows):
        columns = outline(rows).columns
        hint = f"is not a column with values in the {split} rows; they have {choices(columns)}."
        raise user_error(key, column, hint + did_you_mean(column, columns))
    if empty:
        hint = f"is empty in {empty:,} of {len(rows):,} {split} rows: fill it, or remove these rows"
        raise user_error(key, column, hint)
    return by_value
