"""Compares the base model that an adapter was trained on with the served one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flora_train.adapters.peft_config import read_config
from flora_train.config.errors import UserError, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.models.base_identity import base_identity
from flora_train.models.base_record import recorded_base, same_model
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.serving.adapter_files import KEY

ALLOW_VARIABLE = "FLORA_TRAIN_ALLOW_DIFFERENT_BASE"
"""Environment variable: with `1`, other weights are a warning."""


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
        recorded = recorded_base(folder)
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


def _identity(served: ServedBase) -> dict[str, str] | None:
    """The hashes of the served base model; None if its files are unknown or cannot be read."""
    try:
        return base_identity(ModelConfig(path=served.path, revision=served.revision))
    except (UserError, ValueError):
        return None
