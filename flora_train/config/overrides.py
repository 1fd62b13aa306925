"""What do the words of a command line say? `key.sub=value`, and one helpful line for other dialects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from flora_train.config import yaml_reader
from flora_train.config.errors import LONGEST_VALUE, Problem, UserError, did_you_mean
from flora_train.config.paths import RawConfig, shipped
from flora_train.config.suggestions import full_key

ONLY_ONCE = ("recipe", "data_config")
"""Of other keys given twice the last one counts, so that a script's words can be overridden."""
DEEPEST_KEY = 16


def parse_words(words: Sequence[str]) -> RawConfig:
    """The mapping that `key.sub=value` words spell. Raises UserError with every word that is not of that
    form."""
    layer: RawConfig = {}
    problems: list[Problem] = []
    for word in _options_with_their_values(words):
        problem = _dialect_problem(word) or _key_problem(word)
        if problem is None:
            key, _, value = word.partition("=")
            try:
                _set(layer, key.split("."), yaml_reader.read(value))
            except yaml_reader.YamlFaults as error:
                problem = Problem(key, value, _value_fix(key, error.faults[0]))
        if problem is not None:
            problems.append(problem)
    counts = Counter(word.partition("=")[0] for word in words)
    problems += [Problem(key, None, f"is given {counts[key]} times: give one") for key in ONLY_ONCE if counts[key] > 1]
    if problems:
        raise UserError(*problems)
    return layer


def _set(layer: RawConfig, parts: Sequence[str], value: Any) -> None:
    """Put a value at a.b.c; mappings merge, anything else is replaced. Only mappings that this call or
    another made are changed."""
    for part in parts[:-1]:
        below = layer.get(part)
        layer[part] = layer = dict(below) if isinstance(below, dict) else {}
    last, there = parts[-1], layer.get(parts[-1])
    layer[last] = merge(there, value) if isinstance(there, dict) and isinstance(value, dict) else value


def _key_problem(word: str) -> Problem | None:
    key = word.partition("=")[0]
    try:
        word.encode()
    except UnicodeEncodeError:
        return Problem(key.encode(errors="replace").decode(), None, "is not valid UTF-8 text")
    parts = key.split(".")
    if not all(part.strip() == part != "" for part in parts):
        return Problem(word, None, "expected key=value, a dotted key such as training.steps without spaces before the =")
    return Problem(key, None, "has too many parts: no key is that deep") if len(parts) > DEEPEST_KEY else None


def _value_fix(key: str, fault: yaml_reader.Fault) -> str:
    if not fault.hint.startswith(yaml_reader.UNREADABLE):
        return f"{fault.given[:LONGEST_VALUE]} {fault.hint}" if fault.given else fault.hint
    reason = fault.hint.removeprefix(f"{yaml_reader.UNREADABLE}: ")
    return f"{yaml_reader.UNREADABLE} ({reason}); text needs its own quotes: '{key}=\"...\"'"


def merge(below: RawConfig, above: RawConfig) -> RawConfig:
    """Mappings merge key by key; anything else above replaces what is below."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = merge(below[key], value) if both else value
    return merged


def _options_with_their_values(words: Sequence[str]) -> list[str]:
    """`--key value` as one word, so that it gets one answer."""
    joined: list[str] = []
    for word in words:
        option = joined[-1] if joined else ""
        takes_value = option.startswith("--") and option != "--multirun" and not {"=", " "} & set(option)
        if takes_value and "=" not in word and not word.startswith(("-", "+", "~")):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


def _dialect_problem(word: str) -> Problem | None:
    plain = word.lstrip("+~-")
    if word in ("-m", "--multirun"):
        return Problem(word, None, "is Hydra's: there is no multirun here; every adapter of a recipe trains in one run")
    if word.startswith("+"):
        return Problem(word, None, f"is Hydra's: write {plain}, keys need no + here")
    if word.startswith("~"):
        return Problem(
            word,
            None,
            f"is Hydra's: keys cannot be removed here; write {plain.partition('=')[0]}=VALUE to change it",
        )
    if word.startswith("-"):
        key, _, value = plain.replace(" ", "=", 1).partition("=")
        section, dot, field = key.rpartition(".")
        key = full_key(key.split(".")) or f"{section}{dot}{field.replace('-', '_')}"
        return Problem(word, None, f"options are written key=value: {key}={value or 'VALUE'}")
    if "=" not in word or word.startswith("="):
        recipes = shipped("recipes")
        hint = f" Did you mean recipe={word}?" if word in recipes else did_you_mean(word, recipes)
        return Problem(word, None, f"expected key=value.{hint}")
    return None
