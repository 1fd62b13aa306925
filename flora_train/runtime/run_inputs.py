"""Checks that no input of a run is in a folder that the run replaces, and that none of its own files becomes
data.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from flora_train.config.errors import Problem, UserError
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig
from flora_train.runtime.atomic import real_path
from flora_train.runtime.manifest import RUN_FILES

OTHER = "choose another output_dir"


def check_not_replaced(config: RunConfig, folder: Path) -> None:
    """Raises UserError if an input of the run is in the folder of the run that it replaces."""
    replaced, problems = real_path(folder), []
    for key, name in _inputs(config):
        paths = glob.glob(name) or [name]
        if any(real_path(find_file(path)).is_relative_to(replaced) for path in paths):
            problems.append(Problem(key, name, f"is in the run that overwrite=true would delete: {OTHER}"))
    if problems:
        raise UserError(*problems)


def check_not_data(config: RunConfig, folder: Path) -> None:
    """Raises UserError if the run's own files would be read as rows of a task when the run is resumed."""
    own, problems = real_path(folder), []
    for key, source in _sources(config):
        for pattern in _patterns(source):
            if any(_names(pattern, str(own / name)) for name in RUN_FILES):
                hint = (
                    f"is where {key} reads rows ({pattern}), which would match the run's own files: {OTHER}"
                )
                problems.append(Problem("output_dir", str(folder), hint))
    if problems:
        raise UserError(*problems)


def _patterns(source: SourceConfig) -> Iterator[str]:
    """The absolute patterns of a source that may name several files."""
    patterns = list(source.files or ())
    if source.folder is not None:
        patterns.append(str(Path(glob.escape(source.folder), source.glob)))
    for pattern in patterns:
        if glob.has_magic(pattern):
            yield str(find_file(pattern).absolute())


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path: `**` matches folders of any depth, everything else one part of the
    path.
    """
    if "**" in pattern:
        return fnmatch(path, pattern.replace("**/", "*"))
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _sources(config: RunConfig) -> Iterator[tuple[str, SourceConfig]]:
    for name, task in config.tasks.items():
        for split, source in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            if source is not None:
                yield f"tasks.{name}.{split}", source


def _inputs(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield "model.path", config.model.path
    for key, source in _sources(config):
        for name in (*(source.files or ()), source.folder, source.common_voice):
            if name is not None:
                yield key, name
    for family, adapter in config.adapters.items():
        for task in config.tasks if adapter.init_from is not None else ():
            yield f"adapters.{family}.init_from", str(adapter.init_from).replace("{task}", task)
        for member in adapter.over or ():
            yield f"adapters.{family}.over", member
    for problems in config.evaluation.problems or ():
        yield "evaluation.problems", problems
