"""Finds and loads lm_eval's tasks, and collects the requests that they make."""

from __future__ import annotations

import logging
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from flora_train.config.errors import MOST_PROBLEMS, Problem, UserError, did_you_mean, first_line, user_error
from flora_train.evaluation.harness.answers import Requests
from flora_train.evaluation.harness.model import PromptModel, RequestsReached, arguments

PYTHON_SEED, OTHER_SEED = 0, 1234
"""lm_eval's own defaults: of Python, and of numpy, torch and few-shot examples."""


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are asked."""

    names: tuple[str, ...]
    include_path: str | None = None
    """A folder with further tasks."""
    num_fewshot: int | None = None
    limit: float | None = None
    """Documents of a task: their number, or below 1 their share."""
    apply_chat_template: bool = False


class HarnessTasks:
    """Loaded tasks of lm_eval.

    Each evaluation begins with the state of the random number generators in which the tasks were loaded, as
    if lm_eval were called for each contender.
    """

    def __init__(self, options: TaskOptions, base: str) -> None:
        """base: the base model, which some tasks need to know. Raises UserError for unknown tasks, and for
        tasks that cannot be loaded."""
        self.options = options
        manager = _manager(options, base)
        names = _found_names(options, manager)
        _seed()
        try:
            with _quietly():
                self._tasks = manager.load(names)
        except Exception as error:
            raise _not_loaded(options, error) from error
        for task in self._tasks["tasks"].values():
            _set_num_fewshot(task, options.num_fewshot)
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def evaluate(self, model: PromptModel, *, bootstrap_iters: int | None = 100_000) -> Mapping[str, Any]:
        """lm_eval's results of one model."""
        self._restore_states()
        for task in self._tasks["tasks"].values():
            task.set_fewshot_seed(seed=OTHER_SEED)
        with _quietly():
            results: Mapping[str, Any] | None = evaluate(
                lm=model,
                task_dict=self._tasks,
                limit=self.options.limit,
                bootstrap_iters=bootstrap_iters,
                log_samples=False,
                apply_chat_template=self.options.apply_chat_template,
                fewshot_as_multiturn=self.options.apply_chat_template,
            )
        assert results is not None
        return results

    def requests(self, model: PromptModel) -> Requests:
        """All requests of all tasks, as lm_eval will make them. Raises UserError where it cannot."""
        try:
            self.evaluate(model)
        except RequestsReached:
            pass
        except UserError:
            raise
        except Exception as error:
            raise _not_loaded(self.options, error) from error
        instances: dict[str, list[Any]] = {}
        for task in self._tasks["tasks"].values():
            for instance in task.instances:
                repeated = [instance] * instance.repeats
                instances.setdefault(instance.request_type, []).extend(repeated)
        return {kind: arguments(items) for kind, items in instances.items()}

    def _restore_states(self) -> None:
        python, of_numpy, of_torch = self._states
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


def _seed() -> None:
    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)


def _manager(options: TaskOptions, base: str) -> TaskManager:
    """The index of tasks: of the given folder alone where it has all, because lm_eval's own has thousands.
    Raises UserError if the folder is missing."""
    folder, metadata = options.include_path, {"pretrained": base}
    if folder is not None and not Path(folder).is_dir():
        raise user_error("--include-path", folder, "no such folder: give one with the YAML files of tasks")
    files = [name for name in options.names if _is_file(name) and not _holds_group(Path(name))]
    if folder is not None or len(files) == len(options.names):
        manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        if {*options.names} <= {*files, *manager.all_subtasks}:
            return manager
    return TaskManager(include_path=folder, metadata=metadata)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _holds_group(path: Path) -> bool:
    """Whether a file defines a group, which may have tasks of lm_eval."""
    try:
        return re.search(r"^group\s*:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, ValueError):  # reported where the file is loaded
        return False


def _found_names(options: TaskOptions, manager: TaskManager) -> list[str]:
    """The names of tasks, groups and tags, patterns resolved. Raises UserError for those that are unknown."""
    names: list[str] = []
    problems = []
    for name in options.names:
        if _is_file(name):
            if Path(name).is_file():
                names.append(str(Path(name).absolute()))
            else:
                problems.append(Problem("--tasks", name, "no such file"))
            continue
        matches = manager.match_tasks([name])
        if not matches:
            problems.append(Problem("--tasks", name, _unknown(name, options, manager)))
        names += matches
    if problems:
        raise UserError(*problems[:MOST_PROBLEMS])
    return list(dict.fromkeys(names))


def _unknown(name: str, options: TaskOptions, manager: TaskManager) -> str:
    folder = ""
    if options.include_path is not None:
        folder = f" and {options.include_path}"
    own = "give --include-path FOLDER for tasks of your own, `lm_eval ls tasks` lists others"
    if options.include_path is not None:
        own = "`lm_eval validate --tasks NAME --include_path FOLDER` tells why a file is not read"
    meant = did_you_mean(name, manager.all_tasks)
    return f"no task, group or tag of lm_eval{folder} has this name: {own}.{meant}"


def _set_num_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As lm_eval does: a task that is defined without examples stays so."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _not_loaded(options: TaskOptions, error: Exception) -> UserError:
    hint = f"lm_eval cannot prepare these tasks: {type(error).__name__}: {first_line(error)}"
    return user_error("--tasks", ",".join(options.names), hint)


@contextmanager
def _quietly() -> Iterator[None]:
    """A context without lm_eval's progress bars and warnings, which come for each contender and task, and
    with what it prints on standard error."""
    module: Any = lm_eval.api.task
    lm_eval_logger = logging.getLogger("lm_eval")
    original, level = module.tqdm, lm_eval_logger.level

    def plain(items: Sequence[Any], **options: object) -> Sequence[Any]:
        return items

    module.tqdm = plain
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        lm_eval_logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        module.tqdm = original
        lm_eval_logger.setLevel(level)
