"""What is computed for the harness: tokens to score, prompts to continue, and the results of a contender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Answer = tuple[float, bool]
"""The log-probability of a continuation, and whether greedy decoding would produce it."""
Report = Callable[[float], None]
"""Called with the share done."""


@dataclass(frozen=True)
class TokenPair:
    """A continuation that is scored after a context."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class PromptTokens:
    """A prompt that is continued."""

    tokens: tuple[int, ...]
    key: str
    """Its name: the random draws of a sampled continuation depend on it."""
    max_new_tokens: int
    stops: tuple[str, ...]
    """A continuation ends after the first of these texts."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of transformers' `generate`."""


@dataclass(frozen=True)
class Metric:
    """One value of lm_eval's results."""

    task: str
    """Or group."""
    metric: str
    filter_name: str
    value: str
    """As lm_eval's tables write it."""


@dataclass(frozen=True)
class ContenderResults:
    """lm_eval's results of one contender."""

    tables: tuple[str, ...]
    """Of the tasks and, if there are groups, of the groups."""
    metrics: tuple[Metric, ...]
    text: str
    """All results, as JSON."""
