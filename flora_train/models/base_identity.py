"""SHA-256 of a base model's files. It is kept beside them, and made again where a file's size or times have changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import parse_object
from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import find_file
from flora_train.runtime.atomic import real_path, user_cache, write_atomically

KEPT = ".flora_train_sha256.json"
"""Beside the files: name -> its size, times and SHA-256."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers loads: the first of these."""
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
"""What transformers puts on top of the weights where it is there."""
INDIFFERENT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of config.json that change when a model is saved again, and do not change what it computes."""


def base_identity(model: ModelConfig) -> dict[str, str] | None:
    """SHA-256 of the weights, and of config.json without INDIFFERENT; None if the files are not on this machine (yet)."""
    folder = base_folder(model)
    files = [] if folder is None else weight_files(folder)
    if folder is None or not files:
        return None
    try:
        hashes = _hashes(folder, files)
    except OSError as error:
        raise user_error(
            "model.path", model.path, f"has a file that cannot be read: {error.filename} ({error.strerror})"
        ) from error
    whole = hashes[files[0].name] if len(files) == 1 else sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return {"weights": whole, "config": _config_hash(folder / "config.json")}


def base_folder(model: ModelConfig) -> Path | None:
    """Where the base's files lie: a folder, or a snapshot in the hub's cache; None if it has not been fetched."""
    local = find_file(model.path)
    if local.is_dir():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except (HFValidationError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers loads from this folder, sorted; those of them that are there."""
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        names = {path.name for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin"))}
    elif first.suffix == ".json":
        names = _shards(first)
    else:
        names = {first.name}
    names |= set(ADAPTER)
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def _shards(index: Path) -> set[str]:
    try:
        shards = parse_object(index.read_bytes()).get("weight_map")
    except (OSError, ValueError, RecursionError):
        return set()
    return {name for name in shards.values() if isinstance(name, str)} if isinstance(shards, dict) else set()


def _hashes(folder: Path, files: list[Path]) -> dict[str, str]:
    """File name -> SHA-256 of its bytes."""
    linked = any(file.is_symlink() for file in files)  # a snapshot: its files are links to blobs
    places = [user_cache("bases") / f"{sha256(str(real_path(folder)).encode()).hexdigest()[:32]}.json"]
    places = places if linked else [folder / KEPT, *places]
    known: dict[str, Any] = {}
    for place in reversed(places):
        known |= _read(place)
    hashes: dict[str, str] = {file.name: _known(known.get(file.name), file) or _hash(file) for file in files}
    found = {file.name: {**_stamp(file), "sha256": hashes[file.name]} for file in files}
    if any(known.get(name) != entry for name, entry in found.items()):
        _keep({**known, **found}, places)
    return hashes


def _stamp(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _known(entry: Any, file: Path) -> str | None:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
        return None
    return entry["sha256"] if all(entry.get(key) == value for key, value in _stamp(file).items()) else None


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def _read(place: Path) -> dict[str, Any]:
    try:
        return parse_object(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}


def _keep(content: Mapping[str, Any], places: list[Path]) -> None:
    """In the first place that can be written to. Without one, they are made again the next time."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    for place in places:
        try:
            write_atomically(place, lambda path: path.write_text(text, encoding="utf-8"))
        except UserError:
            continue
        return


def _config_hash(file: Path) -> str:
    try:
        content = parse_object(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    kept = {key: value for key, value in content.items() if key not in INDIFFERENT}
    return sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
