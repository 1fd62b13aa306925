"""How do a recipe, a data config and `key=value` words become one RunConfig?

    recipes/NAME.yaml   may name a `data_config`, whose tasks come first and whose `task_defaults` go under each task
    key.sub=value       the command line wins over both

`${other.key}` is resolved at the very end, so that it follows the command line; `\\${` is the two characters.
Nothing is read from the environment, so that no secret is written into a run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flora_train.config import yaml_writer
from flora_train.config.consistency import AdapterOutline, disagreements
from flora_train.config.errors import Problem, UserError, choices, user_error
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
    """The validated configuration of `recipe=NAME key.sub=value ...`.

    Raises UserError with every problem found: unknown keys, wrong types, values out of range or
    contradictory.
    """
    overrides = place_device_slots(parse_overrides(words))
    recipe = overrides.pop("recipe", None)
    if recipe is None:
        names = choices(shipped("recipes"))
        raise user_error("recipe", None, f"say which: recipe=NAME with NAME one of {names}, or recipe=path/to/file.yaml")
    layers = merge(place_device_slots(read_yaml(find_config("recipe", str(recipe)))), overrides)
    data_config = layers.pop("data_config", None)
    if data_config is not None:
        layers = merge(place_device_slots(read_yaml(find_config("data_config", str(data_config)))), layers)
    layers = resolve(layers)
    defaults, tasks = layers.pop("task_defaults", None) or {}, layers.get("tasks")
    if not isinstance(defaults, dict):
        raise user_error("task_defaults", defaults, "must hold keys, as every task does")
    if not isinstance(tasks, dict):
        return validate(layers)
    try:
        return validate({**layers, "tasks": {name: _under(defaults, task) for name, task in tasks.items()}})
    except UserError as error:
        raise UserError(*_unique([_blame_defaults(problem, defaults, tasks) for problem in error.problems])) from None


def validate(raw: RawConfig) -> RunConfig:
    """A RunConfig from plain mappings, or one UserError listing all problems."""
    check_texts(raw)
    raw = place_device_slots(raw)
    raw = {**raw, "adapters": expand_sweeps(raw["adapters"])} if "adapters" in raw else raw
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        problems = to_user_errors(error, raw)
        # pydantic compares sections only when all are valid: to report everything at once, compare them
        # anyway
        known = [(problem.key, problem.value) for problem in problems]
        problems += [problem for problem in _disagreements(raw) if (problem.key, problem.value) not in known]
        raise UserError(*problems) from None


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration so that `recipe=<path>` runs it again, and `load_saved` reads it
    equal."""
    path.write_text(yaml_writer.write(escape(config.model_dump(mode="json"))), encoding="utf-8")


def load_saved(path: Path) -> RunConfig:
    """The configuration that `save_config` wrote. Raises UserError that names the file if it cannot be read,
    or another version wrote it."""
    try:
        return validate(resolve(read_yaml(path)))
    except UserError as error:
        raise UserError(*(_in_file(path, problem) for problem in error.problems)) from None


def _in_file(path: Path, problem: Problem) -> Problem:
    return problem if problem.key.startswith(str(path)) else Problem(f"{path}: {problem.key}", problem.value, problem.hint)


def _under(defaults: RawConfig, task: Any) -> Any:
    """A task on top of the defaults; what is not even a mapping is left for the validation to report."""
    return merge(defaults, task or {}) if isinstance(task, dict | None) else task


def _blame_defaults(problem: Problem, defaults: RawConfig, tasks: RawConfig) -> Problem:
    """A fault that a task only inherits is a fault of `task_defaults`, once."""
    section, _, rest = problem.key.partition(".")
    task, _, field = rest.partition(".")
    if section == "tasks" and _holds(defaults, field) and not _holds(tasks.get(task), field):
        hint = problem.hint.replace(f"'tasks.{task}.", "'task_defaults.")
        return Problem(f"task_defaults.{field}", problem.value, hint)
    return problem


def _holds(layer: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(layer, dict) or part not in layer:
            return False
        layer = layer[part]
    return True


def _unique(problems: list[Problem]) -> list[Problem]:
    return [problem for i, problem in enumerate(problems) if problem not in problems[:i]]


def _disagreements(raw: RawConfig) -> list[Problem]:
    """What the sections contradict in each other, as far as they can be read at all."""

    tasks, adapters = _names_of(raw.get("tasks")), _names_of(raw.get("adapters"))
    outlines = {name: _outline_of(adapter) for name, adapter in adapters.items()}
    steps = _names_of(raw.get("training")).get("steps")
    split_tasks = [name for name, task in tasks.items() if isinstance(task, dict) and task.get("split_by") is not None]
    known_steps = steps if isinstance(steps, int) and steps > 0 else None
    return disagreements(tasks, outlines, known_steps, split_tasks=split_tasks)


def _names_of(section: Any) -> RawConfig:
    """A section with its keys as text; empty where it is no mapping."""
    if not isinstance(section, dict):
        return {}
    return {str(name): value for name, value in section.items()}


def _outline_of(adapter: Any) -> AdapterOutline:
    """What can be read of a raw entry of `adapters`."""
    if not isinstance(adapter, dict):
        return AdapterOutline(None)
    tasks, warmup = adapter.get("tasks"), adapter.get("warmup_steps")
    chosen = [task for task in tasks if isinstance(task, str)] if isinstance(tasks, list) else None
    return AdapterOutline(chosen, warmup if isinstance(warmup, int) else 0)
