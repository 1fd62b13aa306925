"""Suggestions for unknown keys: options of other trainers, former names, and the section that a known key
belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from flora_train.config.schema import RunConfig
from flora_train.config.suggestion_table import SUGGESTIONS, Suggestion

CLOSE, VERY_CLOSE = 0.6, 0.85
"""Similarity (difflib's ratio) of a typing error within a section, and in the whole configuration."""


def suggest(location: Sequence[str], allowed: Sequence[str]) -> str:
    """` Did you mean 'training.steps'? ...` for the unknown key at `location`, or an empty string.

    allowed: the keys of its section. Names of adapters and tasks in `location` are filled into the
    suggestion.
    """
    section, word = location[:-1], normalized(location[-1])
    suggestion = known_elsewhere(word, section)
    if word in allowed:  # the key itself in other letters
        suggestion = Suggestion(".".join([*section, word]))
    elif suggestion is None:
        close = get_close_matches(word, list(allowed), n=1, cutoff=CLOSE)
        suggestion = Suggestion(".".join([*section, *close])) if close else _resembling(word, section)
    return "" if suggestion is None else _sentence(suggestion, section)


def suggest_word(location: Sequence[str]) -> str:
    """As `suggest`, for words of SUGGESTIONS and keys of other sections only."""
    suggestion = known_elsewhere(normalized(location[-1]), location[:-1])
    return "" if suggestion is None else _sentence(suggestion, location[:-1])


def full_key(location: Sequence[str]) -> str | None:
    """The dotted key that an option of another trainer, or a key without its section, stands for; None for
    other words."""
    if ".".join(location) in all_keys():
        return None
    suggestion = known_elsewhere(normalized(location[-1]), location[:-1])
    return None if suggestion is None else _with_names(suggestion.key, location[:-1])


def normalized(word: str) -> str:
    """A key in lower case, with underscores."""
    return word.lower().replace("-", "_").replace(" ", "_")


def _sentence(suggestion: Suggestion, section: Sequence[str]) -> str:
    hint = f" {suggestion.hint}" if suggestion.hint else ""
    return f" Did you mean {_with_names(suggestion.key, section)!r}?{hint}"


def known_elsewhere(word: str, section: Sequence[str]) -> Suggestion | None:
    """The suggestion for an option of another trainer, a former name, or a key of another section."""
    if word in SUGGESTIONS:
        candidates = SUGGESTIONS[word]
    else:
        candidates = tuple(Suggestion(key) for key in all_keys() if key.rpartition(".")[2] == word)
    return _nearest(candidates, section)


def _nearest(candidates: Sequence[Suggestion], section: Sequence[str]) -> Suggestion | None:
    """The candidate that shares most of its sections with `section`, the first of equals."""

    def shared_parts(suggestion: Suggestion) -> int:
        parts = suggestion.key.split(".")[:-1]
        shared = 0
        for part, given in zip(parts, section, strict=False):
            if part not in (given, "NAME"):
                break
            shared += 1
        return shared

    return max(candidates, key=shared_parts, default=None)


def _resembling(word: str, section: Sequence[str]) -> Suggestion | None:
    """The suggestion for a word that resembles a key of another section, or an option of another trainer."""
    by_last_part = [key.rpartition(".")[2] for key in all_keys()]
    close = get_close_matches(word, [*by_last_part, *SUGGESTIONS], n=1, cutoff=VERY_CLOSE)
    return known_elsewhere(close[0], section) if close else None


def _with_names(key: str, section: Sequence[str]) -> str:
    """`key` with the adapter or task that `section` names in place of NAME."""
    if len(section) > 1 and key.startswith(f"{section[0]}.NAME"):
        return key.replace("NAME", section[1], 1)
    return key


@cache
def all_keys() -> tuple[str, ...]:
    """Every dotted key of a configuration, with NAME for names of adapters and tasks."""
    return tuple(_keys_below(RunConfig, ""))


def _keys_below(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        annotation = field.annotation
        yield key
        if get_origin(annotation) is dict:
            key, annotation = f"{key}.NAME", get_args(annotation)[-1]
        below = section_in(annotation)
        if below is not None:
            yield from _keys_below(below, f"{key}.")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in `Section`, `Section | None` or `Annotated[Section, ...]`; None for other types, also for
    lists of sections, whose keys have a number in them."""
    if get_origin(annotation) is list:
        return None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = section_in(inner)
        if found is not None:
            return found
    return None
