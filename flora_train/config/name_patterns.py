"""Patterns of module names, as PEFT reads them: rank_pattern, exclude_modules, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import StringConstraints

from flora_train.config.errors import choices, did_you_mean, first_line

SELECTIONS = ("default", "all-linear", "query-key")
"""Values of target_modules that are no regular expression."""
MOST_LAYERS = 1_000_000
"""Largest index of a layer."""

Regex = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000, strict=True)]
"""A regular expression for complete module names."""

Value = TypeVar("Value")


def is_regex(selection: object) -> bool:
    """Whether a value of target_modules is a regular expression."""
    return isinstance(selection, str) and selection not in SELECTIONS


def check_target_regex(selection: str) -> str:
    """A text for target_modules. Raises ValueError for a misspelled selection, and for what is no regular
    expression."""
    word = selection.lower()
    if word in SELECTIONS:
        return word
    meant = did_you_mean(word.replace("_", "-"), SELECTIONS)
    if meant and re.fullmatch(r"[a-z_-]+", word):
        raise ValueError(
            f"must be {choices(SELECTIONS)}, a list of names, or a regular expression for complete module "
            f"names.{meant}"
        )
    check_regex(selection)
    return selection


def check_regex(pattern: str) -> None:
    """Raises ValueError for text that is no regular expression."""
    if (reason := _why_not_regex(pattern)) is not None:
        raise ValueError(f"is not a regular expression: {reason}")


def check_pattern_keys(keys: Iterable[str]) -> None:
    """Raises ValueError for a key of rank_pattern or alpha_pattern that is no regular expression."""
    for key in keys:
        if (reason := _why_not_regex(key) or _why_not_regex(_ending(key))) is not None:
            raise ValueError(f"has the key {key!r}, which is not a regular expression: {reason}")


def check_layers_pattern(pattern: str) -> None:
    """Raises ValueError for a name in layers_pattern that is no regular expression."""
    if (reason := _why_not_regex(pattern) or _why_not_regex(_layers(pattern))) is not None:
        raise ValueError(f"has {pattern!r}, which is not a regular expression: {reason}")


def _why_not_regex(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return first_line(error)
    return None


def matches_ending(pattern: str, module: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern matches a module name."""
    return re.match(_ending(pattern), module) is not None


def value_for(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first key that matches the module name, as PEFT's `get_pattern_key` finds it."""
    for pattern, value in patterns.items():
        if matches_ending(pattern, module):
            return value
    return patterns.get(module, default)


def ends_with(module: str, suffixes: Iterable[str]) -> bool:
    """Whether a module name is one of these, or ends in one of them after a dot."""
    return any(module == suffix or module.endswith(f".{suffix}") for suffix in suffixes)


def is_excluded(module: str, exclude: Collection[str] | str | None) -> bool:
    """Whether exclude_modules excludes a module: by its ending, or by a regular expression for its name."""
    if not exclude:
        return False
    if isinstance(exclude, str):
        return re.fullmatch(exclude, module) is not None
    return ends_with(module, exclude)


def layer_index(module: str, layers_pattern: Sequence[str] | None) -> int | None:
    """The index of the layer that a module is in, as layers_to_transform counts it; None if there is none."""
    expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    if layers_pattern:
        expressions = [_layers(pattern) for pattern in layers_pattern]
    for expression in expressions:
        if (match := re.match(expression, module)) is not None:
            return int(match["idx"])
    return None


def _layers(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def as_pairs(patterns: Mapping[str, Value] | None) -> tuple[tuple[str, Value], ...]:
    """A mapping as a hashable value that keeps its order."""
    return tuple((patterns or {}).items())
