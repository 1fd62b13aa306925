"""Compares the base model that an adapter was trained on with the served one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flora_train.adapters.peft_config import read_config
from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import parse_object
from flora_train.config.model_schema import ModelConfig
from flora_train.models.base_identity import base_folder, base_identity
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.serving.adapter_files import KEY

ALLOW_VARIABLE = "FLORA_TRAIN_ALLOW_DIFFERENT_BASE"
"""Environment variable: with `1`, other weights are a warning."""
MOST_RECORD_BYTES = 2**16
"""Size limit of BASE_RECORD, which has two hashes."""


@dataclass(frozen=True)
class ServedBase:
    """The base model that a server has loaded."""

    path: str
    """Folder or name on the hub."""
    revision: str | None = None
    """Hub branch, tag or commit."""


def check_base(folder: Path, served: ServedBase, source: str) -> str | None:
    """A warning if the adapter names another base model than the served one, else None.

    folder: of the adapter; source: what an error names. Raises UserError where the adapter's folder records
    the hash of its base model's weights and those of the served one differ, unless ALLOW_VARIABLE allows it.
    The hash of the served one is
    computed once, until its files change.
    """
    try:
        recorded = _recorded(folder, source)
    except (OSError, ValueError) as error:
        hint = f"has a damaged {BASE_RECORD} ({error}): export it again, or remove this file"
        raise user_error(KEY, source, hint) from error
    if recorded is not None:
        now = _identity(served)
        if now is not None and now["weights"] != recorded["weights"]:
            difference = (
                f"was trained on other weights (SHA-256 {recorded['weights'][:12]}) than those of "
                f"{served.path} ({now['weights'][:12]})"
            )
            if os.environ.get(ALLOW_VARIABLE) == "1":
                return f"{source} {difference}"
            hint = f"serve its own base model, or set {ALLOW_VARIABLE}=1 if both are one in two formats"
            raise user_error(KEY, source, f"{difference}: {hint}")
        if now is not None:
            return None
    named = read_config(str(folder), KEY).base_model
    if not named or same_model(named, served.path):
        return None
    return f"{source} was trained on {named}, and the served base model is {served.path}"


def _recorded(folder: Path, source: str) -> Mapping[str, str] | None:
    """The hashes in BASE_RECORD; None if there is no such file, or none in it."""
    file = folder / BASE_RECORD
    if not file.exists():
        return None
    if not file.is_file() or file.stat().st_size > MOST_RECORD_BYTES:
        raise ValueError("it is no file of two hashes")
    base = parse_object(file.read_bytes()).get("base")
    if base is None:
        return None
    if not isinstance(base, Mapping) or not isinstance(base.get("weights"), str):
        raise ValueError("it has no hash of weights")
    return {name: value for name, value in base.items() if isinstance(value, str)}


def _identity(served: ServedBase) -> dict[str, str] | None:
    """The hashes of the served base model; None if its files are unknown or cannot be read."""
    try:
        return base_identity(ModelConfig(path=served.path, revision=served.revision))
    except (UserError, ValueError):
        return None


def same_model(first: str, second: str) -> bool:
    """Whether two names are the same folder, or the same name on the hub."""
    if first == second:
        return True
    folders = [_folder(name) for name in (first, second)]
    if None not in folders and folders[0] == folders[1]:
        return True
    return first.strip("/").lower() == second.strip("/").lower()


def _folder(name: str) -> str | None:
    """The real path of a base model's files; None if they are not on this machine."""
    try:
        folder = base_folder(ModelConfig(path=name))
    except (OSError, ValueError):  # no folder has such a name
        return None
    return None if folder is None else os.path.realpath(folder)
