"""Suggestions for options that are written in another form than a command takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from flora_train.config.errors import Problem, choices, did_you_mean

LONG_OPTION = re.compile(r"--?[A-Za-z]")
ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)=(.*)", re.DOTALL)
OTHER_NAMES = {
    "--k": "--pass-at-k",
    "--ks": "--pass-at-k",
    "--n-jobs": "--workers",
    "--output": "--out",
    "--output-dir": "--out",
}
"""Options of earlier versions and of other programs -> this program's."""

Keys = Literal["none", "results", "all"]
"""The keys of recipes that a command takes as key=value: none, those of `evaluation` and `tasks`, or all."""


def unknown_option(name: str, arg: str, options: Collection[str], *, keys: Keys) -> Problem:
    """An option that a command does not have. arg: as it was written, perhaps with its value."""
    _, _, value = arg.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if (recipe_key := _recipe_key(key, keys)) is not None:
        return Problem(
            name, None, f"keys of the recipe are written key=value: {recipe_key}={value or 'VALUE'}"
        )
    return Problem(
        name, None, f"unknown option; there are {choices(_long(options))}.{_closest(name, options)}"
    )


def option_for_assignment(arg: str, options: Mapping[str, Any], *, keys: Keys) -> Problem | None:
    """The problem of `prompts=FOLDER` where the command has an option --prompts; None for anything else."""
    match = ASSIGNMENT.fullmatch(arg)
    if match is None:
        return None
    key, value = match[1], match[2]
    name = f"--{key.replace('_', '-')}"
    name = OTHER_NAMES.get(name, name)
    if name in options:
        flag = f"{name} {_as_value(value)}"
        if getattr(options[name], "is_flag", False):
            flag = name
        return Problem(key, value or None, f"options of this command begin with --. Did you mean {flag!r}?")
    if keys == "all":  # loading the recipe has better suggestions for its keys
        return None
    if (recipe_key := _recipe_key(key, keys)) is not None:
        return Problem(key, value or None, f"unknown key. Did you mean {f'{recipe_key}={value}'!r}?")
    closest = _closest(name, options)
    if closest:
        return Problem(key, value or None, f"options of this command begin with --.{closest}")
    return None


def _recipe_key(key: str, keys: Keys) -> str | None:
    """The key of a recipe that is meant, of those that a command takes; None if there is none."""
    if keys == "none":
        return None
    from flora_train.config.suggestions import full_key  # loading the schema of recipes is slow

    section, _, _ = key.partition(".")
    meant = full_key(key.split("."))
    if meant is None and "." in key:
        meant = key
    if keys == "all" or meant is None:
        return meant
    if section == "tasks" or meant.startswith("evaluation."):
        return meant
    return None


def _as_value(text: str) -> str:
    """`[lua, perl]` as the command line takes it: `lua,perl`."""
    inner = re.fullmatch(r"\[(.*)\]", text)
    if inner is None:
        return text or "VALUE"
    return ",".join(part.strip() for part in inner[1].split(","))


def _closest(name: str, options: Collection[str]) -> str:
    name = name.replace("_", "-")
    known = OTHER_NAMES.get(name, name)
    if known in options:
        return f" Did you mean {known!r}?"
    return did_you_mean(known, _long(options))


def _long(options: Collection[str]) -> list[str]:
    return [name for name in options if name.startswith("--")]
