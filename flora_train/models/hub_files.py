"""Downloads a base model from the hub: its descriptions first, its weights when they are loaded."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from flora_train.config.paths import find_file
from flora_train.models.base_identity import weight_names
from flora_train.runtime.hub_snapshot import HubFile, open_snapshot

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
    ".pkl",
)
OTHER_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".mp3", ".mp4", ".wav", ".flac")
ARCHIVE_SUFFIXES = (".zip", ".gz", ".tar", ".parquet", ".arrow", ".log")


def download_model(name: str, revision: str | None, *, weights: bool) -> Path:
    """The folder of a model's files at one commit: all but weights and media, and with `weights` those that
    transformers loads. Raises HubError."""
    snapshot = open_snapshot(name, revision, "model")
    files = {file.path: file for file in snapshot.files()}
    for file in files.values():
        if _is_description(file):
            snapshot.download(file)
    if weights:
        for path in weight_names(snapshot.folder, files):
            snapshot.download(files[path])
    return snapshot.folder


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
    if path.suffix in (*WEIGHT_SUFFIXES, *OTHER_SUFFIXES, *ARCHIVE_SUFFIXES):
        return False
    return len(path.parts) == 1 or path.suffix in (".py", ".jinja")
