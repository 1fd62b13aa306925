"""A small recipe, and what loading it says."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from flora_train.config.errors import Problem, UserError
from flora_train.config.load import load_config, validate

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"path": "some/model"},
    "tasks": {"lua": {"train": "lua.jsonl"}, "perl": {"train": "perl.jsonl"}},
    "adapters": {"lora": {"method": "lora", "lr": 1e-3}, "ia3": {"method": "ia3", "lr": 1e-2}},
    "training": {"steps": 10},
}


def small(**dotted: Any) -> dict[str, Any]:
    """SMALL with changes: `small(adapters__lora__rank=0)`."""
    raw = deepcopy(SMALL)
    for key, value in dotted.items():
        *sections, last = key.split("__")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return raw


def refusal(action: Callable[[], object]) -> tuple[Problem, ...]:
    """The problems that an action is refused with."""
    with pytest.raises(UserError) as caught:
        action()
    return caught.value.problems


def faults(**dotted: Any) -> dict[str, str]:
    """Key -> line of every problem in SMALL with these changes; no key may be named twice."""
    problems = refusal(lambda: validate(small(**dotted)))
    assert len({problem.key for problem in problems}) == len(problems), [str(problem) for problem in problems]
    return {problem.key: str(problem) for problem in problems}


def loading_faults(*words: str) -> list[str]:
    """The lines that `load_config(words)` is refused with."""
    return [str(problem) for problem in refusal(lambda: load_config(words))]
