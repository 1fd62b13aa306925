"""Changes to the configuration of a finished run, for commands that evaluate it: keys of `evaluation` and of
its tasks."""

from __future__ import annotations

from collections.abc import Sequence

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.load import validate
from flora_train.config.overrides import merge, parse_overrides
from flora_train.config.paths import RawConfig
from flora_train.config.schema import RunConfig
from flora_train.config.suggestions import full_key

SECTIONS = ("evaluation", "tasks")
SOURCES = ("train", "validation", "test")


def with_overrides(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """The configuration of a run with `evaluation.KEY=VALUE` and `tasks.TASK.KEY=VALUE` instead of its own.

    `tasks.TASK.test` of a task of text stands for its validation rows, on which such a task is evaluated.
    Raises UserError.
    """
    overrides = parse_overrides(words)
    problems = [_other_section(key) for key in overrides if key not in SECTIONS]
    problems += [_not_keys(key, value) for key, value in overrides.items() if not isinstance(value, dict)]
    if problems:
        raise UserError(*problems)
    recorded = config.model_dump(mode="json")
    for name, task in _tasks_of(overrides).items():
        if name not in config.tasks:
            hint = f"the run has no such task; there are {choices(config.tasks)}."
            hint += did_you_mean(name, config.tasks)
            raise user_error(f"tasks.{name}", None, hint)
        if isinstance(task, dict):
            own = config.tasks[name]
            has_test = own.speech is not None or own.is_labelled
            _replace_sources(recorded["tasks"][name], task, has_test=has_test)
    return validate(merge(recorded, overrides))


def changed_tasks(words: Sequence[str]) -> list[str]:
    """The tasks that `with_overrides` changes."""
    return list(_tasks_of(parse_overrides(words)))


def _tasks_of(overrides: RawConfig) -> RawConfig:
    """The section `tasks`; empty where it is missing or not a mapping."""
    tasks = overrides.get("tasks")
    if not isinstance(tasks, dict):
        return {}
    return tasks


def _replace_sources(recorded: RawConfig, task: RawConfig, *, has_test: bool) -> None:
    """A source that is given replaces the recorded one as a whole: its other keys belong to other files.
    has_test: whether the task can have test rows."""
    if not has_test and "test" in task and "validation" not in task:
        task["validation"] = task.pop("test")
    for source in SOURCES:
        if source in task:
            recorded.pop(source, None)


def _other_section(key: str) -> Problem:
    hint = "cannot be changed for a run that is trained: give evaluation.KEY=VALUE or tasks.TASK.KEY=VALUE"
    meant = full_key([key])
    if meant is not None and meant.startswith("evaluation."):
        hint = f"unknown key. Did you mean {meant!r}?"
    return Problem(key, None, f"{hint}{did_you_mean(key, SECTIONS)}")


def _not_keys(key: str, value: object) -> Problem:
    form = "evaluation.KEY=VALUE" if key == "evaluation" else "tasks.TASK.KEY=VALUE"
    return Problem(key, value, f"must hold keys: give {form}")
