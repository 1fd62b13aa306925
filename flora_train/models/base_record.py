"""The base model that an adapter's folder names or records, compared with another one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from flora_train.config.json_format import parse_object
from flora_train.config.model_schema import ModelConfig
from flora_train.models.base_identity import base_folder
from flora_train.runtime.manifest import BASE_RECORD

MOST_RECORD_BYTES = 2**16
"""Size limit of BASE_RECORD, which has two hashes."""


def recorded_base(folder: Path) -> Mapping[str, str] | None:
    """The hashes of the base model in BASE_RECORD of an adapter's folder (see `base_identity`); None if there
    is no such file, or none in it. Raises OSError or ValueError for a damaged one."""
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
