"""Collects what is missing, as problems for the user and as rows for `flora-train doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flora_train.config.errors import Problem


@dataclass
class Findings:
    """Everything that was found before a run."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should know, and does not prevent the run."""
    rows: list[tuple[str, str]] = field(default_factory=list)
    """(heading, state)."""
    suggests_smaller: bool = False
    """Whether another recipe helps: something is missing that it does not need."""
    lacks_base: bool = False
    """Whether not even the configuration of the base model can be read."""

    def add(self, key: str, value: object, hint: str, *, suggests_smaller: bool = False) -> None:
        """Add a problem. suggests_smaller: a smaller recipe does not have it."""
        self.problems.append(Problem(key, value, hint))
        self.suggests_smaller |= suggests_smaller


def enumerate_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
