"""Downloads a base model from the hub: its descriptions first, its weights when they are loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from flora_train.config.errors import choices
from flora_train.config.paths import find_file
from flora_train.models.base_identity import ADAPTER, WEIGHTS, shards_in
from flora_train.runtime.hub_client import OFFLINE_HINT
from flora_train.runtime.hub_snapshot import HubError, HubFile, is_offline, open_snapshot

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ot",
    ".tflite",
    ".npz",
    ".npy",
    ".pkl",
    ".nemo",
    ".mlmodel",
    ".engine",
    ".plan",
    ".llamafile",
    ".ggml",
    ".dduf",
    ".task",
    ".litertlm",
    ".wts",
    ".distcp",
)
OTHER_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".mp3", ".mp4", ".wav", ".flac")
DATA_SUFFIXES = (
    ".zip",
    ".gz",
    ".tgz",
    ".tar",
    ".bz2",
    ".xz",
    ".zst",
    ".7z",
    ".parquet",
    ".arrow",
    ".jsonl",
    ".csv",
    ".tsv",
    ".log",
)
MOST_BYTES = 200_000_000
"""Of a description: the largest tokenizers have a fifth of it. Larger files are weights by another name."""


def download_model(name: str, revision: str | None, *, weights: bool) -> Path:
    """The folder of a model's files at one commit: all but weights and media, and with `weights` those that
    transformers loads. Raises HubError."""
    snapshot = open_snapshot(name, revision, "model")
    files = {file.path: file for file in snapshot.files()}
    for file in files.values():
        if _is_description(file):
            snapshot.download(file)
    if weights:
        for path in _loaded_weights(snapshot.folder, files):
            snapshot.download(files[path])
    return snapshot.folder


def _loaded_weights(folder: Path, files: Mapping[str, HubFile]) -> list[str]:
    """The weights that transformers or PEFT loads, so that nothing is downloaded that cannot be loaded.

    folder: contains the index of shards. Raises HubError where weights are missing.
    """
    first = next((name for name in WEIGHTS if name in files), None)
    adapter = next((name for name in ADAPTER if name in files and "adapter_config.json" in files), None)
    names: set[str] = set()
    if adapter is not None:
        names.add(adapter)
    if first is None:
        if adapter is None:
            raise HubError(_no_weights(files))
    elif first.endswith(".json"):
        names |= _present_shards(folder / first, files)
    else:
        names.add(first)
    return sorted(names)


def _present_shards(index: Path, files: Collection[str]) -> set[str]:
    """Raises HubError unless the repository has all shards of the index."""
    shards = shards_in(index)
    if not shards:
        raise HubError(f"its {index.name} names no weights: it is damaged")
    missing = sorted(shards.difference(files))
    if missing and is_offline():
        raise HubError(f"its file {missing[0]} is not in the local cache, and {OFFLINE_HINT}")
    if missing:
        hint = "the repository is incomplete: give another revision, or ask its owner"
        raise HubError(f"its {index.name} names {missing[0]}, which it does not have: {hint}")
    return shards


def _no_weights(files: Collection[str]) -> str:
    if is_offline():
        return f"its weights are not in the local cache, and {OFFLINE_HINT}"
    others = sorted(path for path in files if PurePosixPath(path).suffix in WEIGHT_SUFFIXES)
    reason = "has no weights that transformers loads (model.safetensors or pytorch_model.bin)"
    if others:
        reason += f", only {choices(others)}"
    return f"{reason}: give a repository in the format of transformers"


def adapter_folder(source: str) -> Path:
    """The folder of a PEFT adapter: a local one, or the downloaded files of the hub. Raises HubError, and
    ValueError for a local folder that does not exist."""
    folder = find_file(source)
    if folder.exists():
        return folder
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError("there is no such folder")
    return download_model(source, None, weights=True)


def _is_description(file: HubFile) -> bool:
    """Whether a file describes the model or its tokenizer, or is its code."""
    path = PurePosixPath(file.path)
    if path.name.startswith("."):
        return False
    if path.suffix in (*WEIGHT_SUFFIXES, *OTHER_SUFFIXES, *DATA_SUFFIXES):
        return False
    if file.size > MOST_BYTES:
        return False
    return len(path.parts) == 1 or path.suffix in (".py", ".jinja")
