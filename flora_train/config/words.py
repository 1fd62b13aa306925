"""What do the words of a command line say? `key.sub=value`, and one helpful line for other dialects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flora_train.config.errors import Problem, UserError, did_you_mean
from flora_train.config.files import Layer, shipped, yaml_reason

ONLY_ONCE = ("recipe", "data_config")
"""Of other keys given twice the last one counts, so that a script's words can be overridden."""


def parse_words(words: Sequence[str]) -> Layer:
    """The mapping that `key.sub=value` words spell. Raises UserError with every word that is not of that form."""
    layer: Layer = {}
    problems: list[Problem] = []
    for word in _options_with_their_values(words):
        problem = _dialect_problem(word)
        if problem is None:
            try:
                layer = merge(layer, OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=False))
            except (OmegaConfBaseException, YAMLError) as error:
                key, _, value = word.partition("=")
                fix = f"is not readable YAML ({yaml_reason(error)}); text needs its own quotes: '{key}=\"...\"'"
                problem = Problem(key, value, fix)
        if problem is not None:
            problems.append(problem)
    counts = Counter(word.partition("=")[0] for word in words)
    problems += [Problem(key, None, f"is given {counts[key]} times: give one") for key in ONLY_ONCE if counts[key] > 1]
    if problems:
        raise UserError(*problems)
    return layer


def from_flags(words: Sequence[str], switches: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """What stands by itself, and `--max-error 0.1`, `--max-error=0.1` or `max_error=0.1` as `max_error=0.1`: for commands that others have
    under the same name, with flags. switches: keys that take no value, `--dry-run` is `dry_run=true`."""
    alone: list[str] = []
    options: list[str] = []
    rest = list(words)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--"):
            (options if equals else alone).append(f"{key}{equals}{value}")
            continue
        key = key[2:].replace("-", "_")
        if key in switches:
            value = value or "true"
        elif not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        options.append(f"{key}={value}")
    return alone, options


def merge(below: Layer, above: Layer) -> Layer:
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
        return Problem(word, None, f"is Hydra's: keys cannot be removed here; write {plain.partition('=')[0]}=VALUE to change it")
    if word.startswith("-"):
        key, _, value = plain.replace(" ", "=", 1).partition("=")
        section, dot, field = key.rpartition(".")
        return Problem(word, None, f"options are written key=value: {section}{dot}{field.replace('-', '_')}={value or 'VALUE'}")
    if "=" not in word or word.startswith("="):
        recipes = shipped("recipes")
        hint = f" Did you mean recipe={word}?" if word in recipes else did_you_mean(word, recipes)
        return Problem(word, None, f"expected key=value.{hint}")
    return None
