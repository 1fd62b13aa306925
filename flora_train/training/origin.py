"""The base model and the data that a run was trained with. Written into run.json, compared wherever either is
loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.config.base import ConfigModel
from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import tokenizer_hash
from flora_train.models.base_identity import base_identity
from flora_train.runtime.run_info import RunInfo, SplitSize, TaskData

logger = logging.getLogger(__name__)


class OriginOptions(ConfigModel):
    allow_different_base: bool = False
    """Continue with another base model than the run was trained on. The results note it."""
    allow_different_data: bool = False
    """Continue with other rows than the run was trained on: held-out examples may have been trained on. The
    results note it.
    """


@dataclass(frozen=True)
class Origin:
    """Hashes of what a run was trained with."""

    base: Mapping[str, str] | None
    """SHA-256 of its files (see base_identity); None if unknown."""
    data: Mapping[str, TaskData]
    """Task -> SHA-256 of its examples, and counts of its splits."""
    tokenizer: str | None = None
    """Its SHA-256 (see tokenizer_hash); None if unknown."""

    @classmethod
    def read(cls, run: RunInfo) -> Origin:
        """From the content of run.json."""
        base = None
        if run.base is not None:
            base = run.base.model_dump()
        tasks = run.data or {}
        return cls(base, {name: data for name, data in tasks.items() if data is not None}, run.tokenizer)

    def base_differences(self, config: RunConfig) -> list[Problem]:
        """A problem if the base at model.path differs. None where the base is not on this machine."""
        if self.base is None:
            logger.warning("run.json does not say which base the run was trained on: it is not compared")
            return []
        now = base_identity(config.model)
        if now is None:
            return []
        names = {"weights": "other weights", "config": "another config.json"}
        changed = [key for key in names if now[key] != self.base[key]]
        if not changed:
            return []
        parts = " and ".join(names[key] for key in changed)
        hashes = f"SHA-256 {self.base[changed[0]][:12]} then, {now[changed[0]][:12]} now"
        return [
            Problem("model.path", config.model.path, f"holds {parts} than the run was trained on ({hashes})")
        ]

    def tokenizer_differences(self, config: RunConfig, tokenizer: Any) -> list[Problem]:
        """A problem if the base's tokenizer gives other tokens than the run's did."""
        if self.tokenizer is None or self.tokenizer == tokenizer_hash(tokenizer):
            return []
        hint = "holds another tokenizer than the run was trained with"
        return [Problem("model.path", config.model.path, hint)]

    def data_differences(self, tasks: Mapping[str, Task]) -> list[Problem]:
        """A problem for every task whose examples differ."""
        problems = []
        for name, task in tasks.items():
            then, now = self.data.get(name), data_of(task)
            if then is not None and then.sha256 != now.sha256:
                hint = (
                    f"gives other examples than the run was trained on ({_change(then, now)}): "
                    "held-out examples may have been trained on"
                )
                problems.append(Problem(f"tasks.{name}", None, hint))
        return problems


def data_of(task: Task) -> TaskData:
    """What identifies a task's examples."""
    test = None
    if task.test is not None:
        test = _size(task.test)
    return TaskData(
        sha256=task.data_hash,
        train=_size(task.train),
        validation=_size(task.validation),
        test=test,
        labels=None if task.label is None else list(task.label.labels),
    )


def allowed(problems: Sequence[Problem], allow: bool, flag: str) -> list[str]:
    """Each difference as a sentence for the results. Raises UserError if they are not allowed. flag: the
    switch that allows them.
    """
    if problems and not allow:
        hint = f"restore it, or give {flag}, which the results note"
        raise UserError(
            *(Problem(problem.key, problem.value, f"{problem.hint}; {hint}") for problem in problems)
        )
    sentences = [f"{problem} ({flag})." for problem in problems]
    for sentence in sentences:
        logger.warning(sentence)
    return sentences


def _size(split: TokenSplit) -> SplitSize:
    return SplitSize(rows=split.counts.rows, examples=split.counts.examples, tokens=split.counts.tokens)


def _change(then: TaskData, now: TaskData) -> str:
    """The first count that differs. Equal counts can be of different rows."""
    sizes = {
        "training": (then.train, now.train),
        "validation": (then.validation, now.validation),
        "test": (then.test, now.test),
    }
    for name, (size_then, size_now) in sizes.items():
        before, after = size_then or SplitSize(), size_now or SplitSize()
        for unit in SplitSize.model_fields:
            count_before, count_after = getattr(before, unit), getattr(after, unit)
            if count_before != count_after:
                return f"{count_before} {name} {unit} then, {count_after} now"
    return "as many rows, with another content, format or tokenizer"
