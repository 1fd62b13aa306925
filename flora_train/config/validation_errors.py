"""Translates the errors of pydantic into problems with the key as the user wrote it, the value and a hint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from flora_train.config.consistency import Contradictions
from flora_train.config.errors import MOST_PROBLEMS, Problem, choices, did_you_mean
from flora_train.config.schema import RunConfig
from flora_train.config.suggestions import section_in, suggest, suggest_word

ONLY_IN_FILES = ("data_config", "recipe", "task_defaults")
"""Keys of the top level that are removed before validation."""

HINTS = {
    "missing": "is required",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must hold names, each with keys below it",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "string_pattern_mismatch": "must be letters, digits, _ and -, and begin with a letter or digit",
    "string_too_long": "must have at most {max_length:,} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text (in quotes, where YAML reads something else)",
    "too_long": "must have at most {max_length} items",
    "too_short": "must have at least {min_length} item(s)",
    "tuple_type": "must be a list",
    "value_error": "{error}",
}
"""pydantic's error type -> hint. Braces name values that pydantic gives with the error."""


LIMITS = ("gt", "ge", "lt", "le")


def to_user_errors(error: ValidationError, raw: Any) -> list[Problem]:
    """The problems of a configuration, one per key. The hints for alternative types of a key are joined by
    "or"."""
    problems: dict[str, Problem] = {}
    for item in error.errors():
        if len(problems) >= MOST_PROBLEMS:
            break
        for problem in _translate(item, raw):
            hint = problem.hint
            if problem.key in problems:
                hint = f"{problems[problem.key].hint}, or {hint}"
            problems[problem.key] = Problem(problem.key, problem.value, hint)
    return list(problems.values())


def _translate(item: Any, raw: Any) -> list[Problem]:
    loc, value, context = _as_written(item["loc"], raw), item["input"], item.get("ctx", {})
    key = ".".join(loc)
    if isinstance(cause := context.get("error"), Contradictions):
        return list(cause.problems)
    if item["type"] == "missing":
        return [Problem(key, None, HINTS["missing"])]
    if item["type"] == "extra_forbidden":
        allowed = _keys_of(loc[:-1])
        return [Problem(key, None, _unknown_key(loc, allowed))]
    if item["type"] == "literal_error":
        options = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return [Problem(key, value, f"must be {choices(options)}.{did_you_mean(value, options)}")]
    if item["type"] in ("model_type", "model_attributes_type"):
        return [Problem(key, value, f"must hold keys: {', '.join(_keys_of(loc))}.{suggest_word(loc)}")]
    hint = HINTS.get(
        item["type"], item["msg"].replace("Input should", "must").replace("{", "{{").replace("}", "}}")
    )
    limits = {name: _readable(context[name]) for name in LIMITS if name in context}
    if item["loc"][-1] == "[key]":
        value = None
    return [Problem(key, value, hint.format(**{**context, **limits}))]


def _readable(limit: float) -> str:
    """A limit with thousands separators, or in scientific notation if it is very large or small."""
    if isinstance(limit, int):
        return f"{limit:,}"
    if abs(limit) >= 1e20 or 0 < abs(limit) < 1e-4:
        return f"{limit:g}"
    return f"{limit:,.10g}"


def _as_written(loc: Sequence[Any], raw: Any) -> tuple[str, ...]:
    """The location of an error as the user wrote it, without parts that pydantic adds (alternatives, `[key]`,
    shorthands)."""
    written = []
    for part in loc:
        if isinstance(raw, dict) or (raw is None and str(part).isidentifier()):
            raw = (raw or {}).get(part)
        elif isinstance(raw, list) and isinstance(part, int):
            raw = raw[part] if part < len(raw) else None
        else:
            continue
        if part != "[key]":
            written.append(str(part))
    return tuple(written)


def _keys_of(loc: Sequence[str]) -> list[str]:
    """The keys that the schema allows in a section, those that are required first."""
    section: Any = RunConfig
    for part in loc:
        section = _section_below(section, part)
    keys = sorted(section.model_fields, key=lambda name: not section.model_fields[name].is_required())
    if section is RunConfig:
        keys += ONLY_IN_FILES
    return keys


def _section_below(section: Any, part: str) -> Any:
    """The section, or the mapping of sections by name, in a part of a section."""
    if get_origin(section) is dict:
        return section_in(get_args(section)[-1])
    annotation = section.model_fields[part].annotation
    if get_origin(annotation) is dict:
        return annotation
    return section_in(annotation)


def _unknown_key(location: Sequence[str], allowed: Sequence[str]) -> str:
    """What an unknown key means; the keys of its section where the word is not known from elsewhere."""
    suggestion = suggest_word(location)
    if suggestion:
        return f"unknown key.{suggestion}"
    return f"unknown key; the keys here are {', '.join(sorted(allowed))}.{suggest(location, allowed)}"
