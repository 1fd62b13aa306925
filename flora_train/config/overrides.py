"""Overrides of a command line: `key.sub=value`, with a one-line correction for the syntax of other
programs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from flora_train.config import yaml_reader
from flora_train.config.errors import LONGEST_VALUE, Problem, UserError, did_you_mean
from flora_train.config.json_format import JsonValue
from flora_train.config.paths import RawConfig, shipped
from flora_train.config.suggestions import full_key

ONLY_ONCE = ("recipe", "data_config")
"""Keys that can be given once. Of other keys the last value counts, so that the arguments of a script can be
overridden."""
DEEPEST_KEY = 16
"""Parts of a dotted key."""


def parse_overrides(argv: Sequence[str]) -> RawConfig:
    """The nested mapping of `key.sub=value` arguments. Raises UserError with every argument that has another
    form."""
    overrides: RawConfig = {}
    problems: list[Problem] = []
    for argument in _join_flags(argv):
        problem = _syntax_problem(argument) or _key_problem(argument)
        if problem is None:
            key, _, value = argument.partition("=")
            try:
                _set(overrides, key.split("."), yaml_reader.read(value))
            except yaml_reader.YamlFaults as error:
                problem = Problem(key, value, _value_hint(key, error.faults[0]))
        if problem is not None:
            problems.append(problem)
    counts = Counter(argument.partition("=")[0] for argument in argv)
    for key in ONLY_ONCE:
        if counts[key] > 1:
            problems.append(Problem(key, None, f"is given {counts[key]} times: give one"))
    if problems:
        raise UserError(*problems)
    return overrides


def merge(below: RawConfig, above: RawConfig) -> RawConfig:
    """Mappings are merged key by key; any other value above replaces the one below."""
    merged = dict(below)
    for key, value in above.items():
        value_below = below.get(key)
        if isinstance(value, dict) and isinstance(value_below, dict):
            merged[key] = merge(value_below, value)
        else:
            merged[key] = value
    return merged


def _set(mapping: RawConfig, parts: Sequence[str], value: JsonValue) -> None:
    """Put a value at a.b.c. Mappings are merged, other values replaced; mappings of the value itself stay
    unchanged."""
    for part in parts[:-1]:
        below = mapping.get(part)
        section: RawConfig = {}
        if isinstance(below, dict):
            section = dict(below)
        mapping[part] = section
        mapping = section
    key = parts[-1]
    before = mapping.get(key)
    if isinstance(before, dict) and isinstance(value, dict):
        value = merge(before, value)
    mapping[key] = value


def _key_problem(argument: str) -> Problem | None:
    """Why the key of an argument cannot be a key, or None."""
    key = argument.partition("=")[0]
    try:
        argument.encode()
    except UnicodeEncodeError:
        return Problem(key.encode(errors="replace").decode(), None, "is not valid UTF-8 text")
    parts = key.split(".")
    if not all(part.strip() == part != "" for part in parts):
        hint = "expected key=value, a dotted key such as training.steps without spaces before the ="
        return Problem(argument, None, hint)
    if len(parts) > DEEPEST_KEY:
        return Problem(key, None, "has too many parts: no key is that deep")
    return None


def _value_hint(key: str, fault: yaml_reader.Fault) -> str:
    """What is wrong with a value that is not YAML."""
    if fault.hint.startswith(yaml_reader.UNREADABLE):
        reason = fault.hint.removeprefix(f"{yaml_reader.UNREADABLE}: ")
        return f"{yaml_reader.UNREADABLE} ({reason}); text needs its own quotes: '{key}=\"...\"'"
    if fault.given:
        return f"{fault.given[:LONGEST_VALUE]} {fault.hint}"
    return fault.hint


def _join_flags(argv: Sequence[str]) -> list[str]:
    """`--key value` as one argument, so that it is corrected once."""
    joined: list[str] = []
    for argument in argv:
        flag = joined[-1] if joined else ""
        takes_value = flag.startswith("--") and flag != "--multirun" and not {"=", " "} & set(flag)
        if takes_value and "=" not in argument and not argument.startswith(("-", "+", "~")):
            joined[-1] += f" {argument}"
        else:
            joined.append(argument)
    return joined


def _syntax_problem(argument: str) -> Problem | None:
    """The correction of an argument in the syntax of Hydra or of flags, or of one without a value; None for
    key=value."""
    plain = argument.lstrip("+~-")
    if argument in ("-m", "--multirun"):
        hint = "is Hydra syntax: there is no multirun, because every adapter of a recipe trains in one run"
    elif argument.startswith("+"):
        hint = f"is Hydra syntax: write {plain}, keys need no +"
    elif argument.startswith("~"):
        key = plain.partition("=")[0]
        hint = f"is Hydra syntax: keys cannot be removed; write {key}=VALUE to change it"
        if re.fullmatch(r"(adapters|tasks)\.[^.]+", key):
            hint = f"is Hydra syntax: write {key}=null to leave it out"
    elif argument.startswith("-"):
        hint = f"options are written key=value: {_as_override(plain)}"
    elif "=" not in argument or argument.startswith("="):
        hint = f"expected key=value.{_recipe_hint(argument)}"
    else:
        return None
    return Problem(argument, None, hint)


def _as_override(flag: str) -> str:
    """`learning-rate 1e-4` as adapters.NAME.lr=1e-4."""
    key, _, value = flag.replace(" ", "=", 1).partition("=")
    section, dot, field = key.rpartition(".")
    known = full_key(key.split("."))
    if known is None:
        known = f"{section}{dot}{field.replace('-', '_')}"
    return f"{known}={value or 'VALUE'}"


def _recipe_hint(argument: str) -> str:
    recipes = shipped("recipes")
    if argument in recipes:
        return f" Did you mean recipe={argument}?"
    return did_you_mean(argument, recipes)
