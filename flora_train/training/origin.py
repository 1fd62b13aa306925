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
    data: Mapping[str, Mapping[str, Any]]
    """Task -> SHA-256 of its examples, and counts of its splits."""
    tokenizer: str | None = None
    """Its SHA-256 (see tokenizer_hash); None if unknown."""

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Origin:
        """From the content of run.json."""
        base, data, tokenizer = facts.get("base"), facts.get("data"), facts.get("tokenizer")
        if not isinstance(base, dict) or not all(
            isinstance(base.get(key), str) for key in ("weights", "config")
        ):
            base = None
        if not isinstance(data, dict):
            data = {}
        if not isinstance(tokenizer, str):
            tokenizer = None
        return cls(base, {name: entry for name, entry in data.items() if isinstance(entry, dict)}, tokenizer)

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
            if then is not None and then.get("sha256") != now["sha256"]:
                hint = (
                    f"gives other examples than the run was trained on ({_change(then, now)}): "
                    "held-out examples may have been trained on"
                )
                problems.append(Problem(f"tasks.{name}", None, hint))
        return problems


def data_of(task: Task) -> dict[str, Any]:
    """What identifies a task's examples, for run.json."""
    identity: dict[str, Any] = {"sha256": task.data_hash}
    for name, split in (("train", task.train), ("validation", task.validation), ("test", task.test)):
        if split is not None:
            identity[name] = _counts(split)
    return identity


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


def _counts(split: TokenSplit) -> dict[str, int]:
    return {"rows": split.counts.rows, "examples": split.counts.examples, "tokens": split.counts.tokens}


def _change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first count that differs. Equal counts can be of different rows."""
    names = {"train": "training", "validation": "validation", "test": "test"}
    for split, name in names.items():
        for unit in ("rows", "examples", "tokens"):
            before, after = _count(then, split, unit), _count(now, split, unit)
            if before != after:
                return f"{before} {name} {unit} then, {after} now"
    return "as many rows, with another content, format or tokenizer"


def _count(counts: Mapping[str, Any], split: str, unit: str) -> Any:
    of_split = counts.get(split)
    return of_split.get(unit) if isinstance(of_split, dict) else None
