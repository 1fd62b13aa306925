"""Tasks that are made of the values of a column (tasks.NAME.split_by), and the rows of each."""

from __future__ import annotations

import logging
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, user_error
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.documents import LocatedRow
from flora_train.data.row_groups import RowGroups, RowsOfValue, group_rows
from flora_train.data.row_survey import with_progress
from flora_train.data.sources import SourceRows, source_files

MOST_TASKS = 10_000
"""Largest number of tasks from one split_by."""
LONGEST_PART = 64
"""Characters of a value that its task's name has."""
SPELLED = {"+": "p", "#": "sharp", "&": "and", "%": "percent"}
"""Characters that distinguish values such as C, C++ and C#, with their spelling in names."""

MOST_SOURCES = 8
"""Sources whose rows are cached until all tasks are loaded."""
_read: dict[tuple[object, ...], RowGroups] = {}

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


def task_rows(task: TaskConfig, split: str, key: str) -> Iterable[LocatedRow]:
    """The rows of a split ("train", "validation" or "test") of a task, which can be iterated more than once;
    `key` is the task's configuration key.

    Raises UserError where a task of one value has no row; iterating raises it as `located_rows` does.
    """
    source: SourceConfig = getattr(task, split)
    if task.split_by is None:
        return SourceRows(source, f"{key}.{split}")
    groups = _rows_by_value(source, task.split_by, key, split)
    if str(task.split_value) not in groups.counts:
        hint = f"is in no row of {key}.{split}; values of {task.split_by} are {choices(groups.counts)}"
        raise user_error(f"{key}.split_value", task.split_value, hint)
    return RowsOfValue(groups, str(task.split_value))


def forget_rows() -> None:
    """Free the rows that are kept so that the tasks of one source read it once."""
    _read.clear()


def _made_tasks(name: str, task: TaskConfig) -> dict[str, str]:
    """Name -> value of the tasks that a split_by makes, in the order of the values."""
    key, column = f"tasks.{name}", str(task.split_by)
    train = _rows_by_value(task.train, column, key, "train").counts
    if len(train) > MOST_TASKS:
        hint = f"has {len(train):,} different values, which would be tasks: at most {MOST_TASKS:,} are made"
        raise user_error(f"{key}.split_by", column, hint)
    single = [value for value, count in train.items() if count < 2]
    if task.validation is None and single:
        hint = (
            f"has {len(single):,} value(s) with one row, {single[0]!r} for example, so that none can be held "
            "out: give a validation source, or more rows"
        )
        raise user_error(f"{key}.split_by", column, hint)
    for split in ("validation", "test"):
        source: SourceConfig | None = getattr(task, split)
        if source is None:
            continue
        missing = train.keys() - _rows_by_value(source, column, key, split).counts.keys()
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


def _rows_by_value(source: SourceConfig, column: str, key: str, split: str) -> RowGroups:
    """The rows of a source by their values in `column`. Read once for all tasks of the source."""
    files = source_files(source, f"{key}.{split}")
    content = (source.model_dump_json(), column, *(_stamp(path) for path in files))
    if content not in _read:
        if len(_read) >= MOST_SOURCES:
            _read.clear()
        name = f"{key.removeprefix('tasks.')} ({split})"
        rows = with_progress(SourceRows(source, f"{key}.{split}"), name)
        _read[content] = group_rows(rows, column, f"{key}.split_by", split)
    return _read[content]


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
