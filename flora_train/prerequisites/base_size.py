"""Size of the base model: from its files, from the hub, or from the table of published models."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import find_file
from flora_train.config.published_models import published_parameters
from flora_train.models.base_identity import WEIGHTS, weight_files
from flora_train.models.model_path import is_local
from flora_train.prerequisites.cache import cached_model
from flora_train.runtime.hub_probe import Answer, Repository

LONGEST_HEADER = 100 << 20
"""Bytes of a safetensors header, as in the library."""
FLOAT32 = 4
"""Bytes of the widest values of published models: parameters are not fewer than bytes / FLOAT32."""


@dataclass(frozen=True)
class BaseSize:
    parameters: int
    """0 where unknown."""
    download: int = 0
    """Bytes that are not on this machine."""


def size_of_base(model: ModelConfig, answers: Mapping[Repository, Answer]) -> BaseSize:
    """The size of the base. answers: of the hub."""
    if is_local(model.path):
        return BaseSize(_parameters_of_folder(find_file(model.path)))
    repository = Repository("model", model.path, model.revision, file="config.json", with_sizes=True)
    folder = cached_model(repository)
    if folder is not None:
        return BaseSize(_parameters_of_folder(folder))
    answer = answers.get(repository)
    download = 0 if answer is None else bytes_of_weights(answer.files)
    if answer is not None and (answer.parameters or download):
        return BaseSize(answer.parameters or download // FLOAT32, download)
    if answer is not None and answer.access == "busy":
        return BaseSize(0)  # it may be another model than the published one of this name
    return BaseSize(published_parameters(model.path) or 0)


def bytes_of_weights(files: Mapping[str, int]) -> int:
    """Bytes of the weight files that transformers loads: of one format and number format alone."""
    first = next((name for name in WEIGHTS if name in files), "")
    if first in files and not first.endswith(".json"):
        return files[first]
    stem, _, ending = first.removesuffix(".index.json").partition(".")
    shard = re.compile(rf"{stem}-\d+-of-\d+\.{ending}")
    shards = sum(size for name, size in files.items() if shard.fullmatch(name))
    if shards:
        return shards
    for ending in (".safetensors", ".bin"):
        sizes = [size for name, size in files.items() if name.endswith(ending) and "/" not in name]
        if sizes:
            return sum(sizes)
    return 0


def _parameters_of_folder(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(map(_parameters_of_file, weight_files(folder)))


def _parameters_of_file(file: Path) -> int:
    """The number of values in a weight file; at least one in FLOAT32 bytes where its header is unreadable."""
    try:
        if file.suffix == ".safetensors":
            return sum(map(prod, _shapes(file)))
        return file.stat().st_size // FLOAT32
    except (OSError, ValueError, TypeError, KeyError, struct.error):
        return 0


def _shapes(file: Path) -> list[list[int]]:
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header = json.loads(content.read(min(length, LONGEST_HEADER)))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
