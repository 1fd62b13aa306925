"""Builds the configuration of a run from a recipe, a data config and `key=value` overrides.

    recipes/NAME.yaml   may name a `data_config`, whose tasks come first, and `task_defaults` for all tasks
    key.sub=value       an override, which takes precedence over both
    adapters.NAME=null  leaves an entry of `adapters` or `tasks` out

`${other.key}` is resolved last, so that it refers to overridden values; `\\${` stands for the two characters.
Nothing is read from the environment, so that no secret is written into a run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flora_train.config import yaml_writer
from flora_train.config.consistency import AdapterOutline, disagreements
from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.overrides import merge, parse_overrides
from flora_train.config.paths import (
    PROJECT_ROOT,
    RawConfig,
    check_texts,
    find_config,
    find_file,
    read_yaml,
    shipped,
)
from flora_train.config.references import escape, resolve
from flora_train.config.schema import RunConfig
from flora_train.config.sweep import expand_sweeps
from flora_train.config.training_schema import place_device_slots
from flora_train.config.validation_errors import to_user_errors

__all__ = ["PROJECT_ROOT", "find_file", "load_config", "save_config", "shipped", "validate"]


def load_config(words: Sequence[str]) -> RunConfig:
    """Load and validate the configuration of a run.

    Args:
        words: `recipe=NAME` and overrides `key.sub=value`, as on the command line.

    Returns:
        The configuration.

    Raises:
        UserError: with all problems: unknown keys, wrong types, values that are out of range or contradict
            each other.
    """
    overrides = place_device_slots(parse_overrides(words))
    recipe = overrides.pop("recipe", None)
    if recipe is None:
        names = choices(shipped("recipes"))
        hint = f"is required: recipe=NAME with NAME one of {names}, or recipe=path/to/file.yaml"
        raise user_error("recipe", None, hint)
    overrides, left_out = _split_off_nulls(overrides)
    raw = merge(_read_config("recipe", recipe), overrides)
    data_config = raw.pop("data_config", None)
    if data_config is not None:
        raw = merge(_read_config("data_config", data_config), raw)
    raw = _without(resolve(raw), left_out)
    defaults, tasks = raw.pop("task_defaults", None) or {}, raw.get("tasks")
    if not isinstance(defaults, dict):
        raise user_error("task_defaults", defaults, "must hold keys, as every task does")
    if not isinstance(tasks, dict):
        return validate(raw)
    with_defaults = {name: _with_defaults(defaults, task) for name, task in tasks.items()}
    try:
        return validate({**raw, "tasks": with_defaults})
    except UserError as error:
        problems = [_blame_defaults(problem, defaults, tasks) for problem in error.problems]
        raise UserError(*_unique(problems)) from None


def validate(raw: RawConfig) -> RunConfig:
    """A RunConfig from plain mappings. Raises one UserError with all problems."""
    check_texts(raw)
    raw = place_device_slots(raw)
    if "adapters" in raw:
        raw = {**raw, "adapters": expand_sweeps(raw["adapters"])}
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = to_user_errors(error, raw)
        # pydantic compares sections only if all of them are valid; they are compared here so that all
        # problems are reported
        known = [(problem.key, problem.value) for problem in problems]
        problems += [problem for problem in _disagreements(raw) if (problem.key, problem.value) not in known]
        raise UserError(*problems) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write a resolved configuration. `recipe=<path>` runs it again, and `load_saved` reads it back equal."""
    path.write_text(yaml_writer.write(escape(config.model_dump(mode="json"))), encoding="utf-8")


def load_saved(path: Path) -> RunConfig:
    """The configuration in a file of `save_config`. Raises UserError that names the file if it cannot be read
    or is from another version."""
    try:
        return validate(resolve(read_yaml(path)))
    except UserError as error:
        raise UserError(*(_in_file(path, problem) for problem in error.problems)) from None


def _split_off_nulls(overrides: RawConfig) -> tuple[RawConfig, dict[str, list[str]]]:
    """The overrides without `adapters.NAME=null` and `tasks.NAME=null`, and these names by section."""
    kept = dict(overrides)
    left_out: dict[str, list[str]] = {}
    for section in ("adapters", "tasks"):
        entries = overrides.get(section)
        if isinstance(entries, dict):
            left_out[section] = [name for name, entry in entries.items() if entry is None]
            kept[section] = {name: entry for name, entry in entries.items() if entry is not None}
    return kept, left_out


def _without(raw: RawConfig, left_out: Mapping[str, Sequence[str]]) -> RawConfig:
    """The configuration without some entries, to which others may have referred. Raises UserError for unknown
    names."""
    remaining = dict(raw)
    for section, names in left_out.items():
        entries = raw.get(section)
        known = entries if isinstance(entries, dict) else {}
        for name in names:
            if name not in known:
                hint = f"there is none to leave out; there are {choices(known)}.{did_you_mean(name, known)}"
                raise user_error(f"{section}.{name}", None, hint)
        if names:
            remaining[section] = {name: entry for name, entry in known.items() if name not in names}
    return remaining


def _read_config(kind: str, name: object) -> RawConfig:
    return place_device_slots(read_yaml(find_config(kind, str(name))))


def _in_file(path: Path, problem: Problem) -> Problem:
    """A problem whose key names the file."""
    if problem.key.startswith(str(path)):
        return problem
    return Problem(f"{path}: {problem.key}", problem.value, problem.hint)


def _with_defaults(defaults: RawConfig, task: Any) -> Any:
    """A task on top of the defaults. A task that is not a mapping is returned as it is, for the validation to
    report."""
    if task is None or isinstance(task, dict):
        return merge(defaults, task or {})
    return task


def _blame_defaults(problem: Problem, defaults: RawConfig, tasks: RawConfig) -> Problem:
    """A problem of a key that a task inherits, as a problem of `task_defaults`."""
    section, _, rest = problem.key.partition(".")
    task, _, field = rest.partition(".")
    if section == "tasks" and _holds(defaults, field) and not _holds(tasks.get(task), field):
        hint = problem.hint.replace(f"'tasks.{task}.", "'task_defaults.")
        return Problem(f"task_defaults.{field}", problem.value, hint)
    return problem


def _holds(mapping: Any, dotted: str) -> bool:
    """Whether nested mappings have a dotted key."""
    for part in dotted.split("."):
        if not isinstance(mapping, dict) or part not in mapping:
            return False
        mapping = mapping[part]
    return True


def _unique(problems: list[Problem]) -> list[Problem]:
    return [problem for i, problem in enumerate(problems) if problem not in problems[:i]]


def _disagreements(raw: RawConfig) -> list[Problem]:
    """Contradictions between sections, as far as they can be read."""

    tasks, adapters = _names_of(raw.get("tasks")), _names_of(raw.get("adapters"))
    outlines = {name: _outline_of(adapter) for name, adapter in adapters.items()}
    steps = _names_of(raw.get("training")).get("steps")
    split_tasks = [
        name for name, task in tasks.items() if isinstance(task, dict) and task.get("split_by") is not None
    ]
    if not isinstance(steps, int) or steps <= 0:
        steps = None
    return disagreements(tasks, outlines, steps, split_tasks=split_tasks)


def _names_of(section: Any) -> RawConfig:
    """A section with its keys as text; empty if it is not a mapping."""
    if not isinstance(section, dict):
        return {}
    return {str(name): value for name, value in section.items()}


def _has_split(task: Any) -> bool:
    return isinstance(task, dict) and task.get("split_by") is not None


def _outline_of(adapter: Any) -> AdapterOutline:
    """The outline of a raw entry of `adapters`, as far as it can be read."""
    if not isinstance(adapter, dict):
        return AdapterOutline(None)
    tasks, warmup = adapter.get("tasks"), adapter.get("warmup_steps")
    chosen = None
    if isinstance(tasks, list):
        chosen = [task for task in tasks if isinstance(task, str)]
    if not isinstance(warmup, int):
        warmup = 0
    return AdapterOutline(chosen, warmup)
