"""The base model and the data that a run was trained with. Written into run.json, compared wherever either is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.config.base import ConfigModel
from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.data.task import Task
from flora_train.data.tokenization import TokenSplit, tokenizer_hash
from flora_train.models.base_identity import base_identity

logger = logging.getLogger(__name__)


class OriginOptions(ConfigModel):
    allow_different_base: bool = False
    """Go on with another base model than the run was trained on. Results say so."""
    allow_different_data: bool = False
    """Go on with other rows than the run was trained on: held-out examples may have been trained on. Results say so."""


@dataclass(frozen=True)
class Origin:
    """base: SHA-256 of its files (see base_identity), None if unknown; data: task -> SHA-256 of its examples, and counts of its splits;
    tokenizer: its SHA-256 (see tokenizer_hash), None if unknown."""

    base: Mapping[str, str] | None
    data: Mapping[str, Mapping[str, Any]]
    tokenizer: str | None = None

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Origin:
        """What run.json says."""
        base, data = facts.get("base"), facts.get("data")
        known = isinstance(base, dict) and all(
            isinstance(base.get(key), str) for key in ("weights", "config")
        )
        rows = (
            {name: entry for name, entry in data.items() if isinstance(entry, dict)}
            if isinstance(data, dict)
            else {}
        )
        tokenizer = facts.get("tokenizer")
        return cls(base if known else None, rows, tokenizer if isinstance(tokenizer, str) else None)

    def base_differences(self, config: RunConfig) -> list[Problem]:
        """One problem if the base at model.path is another one. Nothing where it is not on this machine."""
        if self.base is None:
            logger.warning("run.json does not say which base the run was trained on: it is not compared")
            return []
        now = base_identity(config.model)
        words = {"weights": "weights", "config": "a config.json"}
        found = [] if now is None else [key for key in words if now[key] != self.base[key]]
        if now is None or not found:
            return []
        what = " and ".join(
            f"other {words[key]}" if key == "weights" else "another config.json" for key in found
        )
        hashes = f"SHA-256 {self.base[found[0]][:12]} then, {now[found[0]][:12]} now"
        return [
            Problem("model.path", config.model.path, f"holds {what} than the run was trained on ({hashes})")
        ]

    def tokenizer_differences(self, config: RunConfig, tokenizer: Any) -> list[Problem]:
        """One problem if the base's tokenizer makes other tokens of a text than the run's did."""
        if self.tokenizer is None or self.tokenizer == tokenizer_hash(tokenizer):
            return []
        return [
            Problem("model.path", config.model.path, "holds another tokenizer than the run was trained with")
        ]

    def data_differences(self, tasks: Mapping[str, Task]) -> list[Problem]:
        """A problem for every task whose examples are others."""
        problems = []
        for name, task in tasks.items():
            then, now = self.data.get(name), data_of(task)
            if then is not None and then.get("sha256") != now["sha256"]:
                what = f"gives other examples than the run was trained on ({_change(then, now)})"
                problems.append(
                    Problem(f"tasks.{name}", None, f"{what}: held-out examples may have been trained on")
                )
        return problems


def data_of(task: Task) -> dict[str, Any]:
    """What identifies a task's examples."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test}
    return {
        "sha256": task.data_hash,
        **{name: _counts(split) for name, split in splits.items() if split is not None},
    }


def allowed(problems: Sequence[Problem], allow: bool, flag: str) -> list[str]:
    """Each difference as a sentence for the results. Raises UserError where they are not allowed. flag: what allows them."""
    if problems and not allow:
        hint = f"put back what it was, or give {flag}, and the results say so"
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
    """The first count that differs; the same counts can be of other rows."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    for split, word in words.items():
        for unit in ("rows", "examples", "tokens"):
            before, after = (
                counts[split].get(unit) if isinstance(counts.get(split), dict) else None
                for counts in (then, now)
            )
            if before != after:
                return f"{before} {word} {unit} then, {after} now"
    return "as many rows, with another content, format or tokenizer"
