"""SHA-256 of a base model's files, cached beside them and computed again if a file's size or times have
changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import parse_object
from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import find_file
from flora_train.runtime.atomic import real_path, user_cache, write_atomically
from flora_train.runtime.hub_snapshot import pinned_commit

HASHES_FILE = ".flora_train_sha256.json"
"""Cache beside the model's files: name -> size, times and SHA-256."""
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""transformers loads the first of these that exists."""
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
"""transformers adds these to the weights if they exist."""
IGNORED_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of config.json that change when a model is saved again, but do not change what it computes."""


def base_identity(model: ModelConfig) -> dict[str, str] | None:
    """SHA-256 of the weights, and of config.json without IGNORED_KEYS; None if the files are not on this
    machine (yet)."""
    folder = base_folder(model)
    if folder is None:
        return None
    files = weight_files(folder)
    if not files:
        return None
    try:
        hashes = _hashes(folder, files)
    except OSError as error:
        hint = f"has a file that cannot be read: {error.filename} ({error.strerror})"
        raise user_error("model.path", model.path, hint) from error
    weights = hashes[files[0].name]
    if len(files) > 1:
        weights = sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return {"weights": weights, "config": _config_hash(folder / "config.json")}


def base_folder(model: ModelConfig) -> Path | None:
    """The folder of the base's files: a local folder, or a snapshot in the hub's cache; None if it was not
    downloaded."""
    local = find_file(model.path)
    if local.is_dir():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    revision = pinned_commit(model.path, model.revision, "model") or model.revision
    try:
        path = try_to_load_from_cache(model.path, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return None
    if not isinstance(path, str):
        return None
    folder = Path(path).parent
    expected = weight_names(folder, {file.name for file in folder.iterdir()}, with_missing=True)
    is_complete = all((folder / name).is_file() for name in expected)
    return folder if is_complete else None  # a download that was interrupted


def weight_files(folder: Path) -> list[Path]:
    """The existing weight files that transformers loads from this folder, sorted."""
    return [folder / name for name in weight_names(folder, {path.name for path in folder.glob("*")})]


def weight_names(folder: Path, present: Collection[str], *, with_missing: bool = False) -> list[str]:
    """The weight files that transformers loads, sorted.

    folder: contains the index of shards; present: the files that there are; with_missing: also the shards
    of the index that there are not.
    """
    first = next((name for name in WEIGHTS if name in present), None)
    if first is None:
        names = {name for name in present if name.endswith((".safetensors", ".bin")) and "/" not in name}
    elif first.endswith(".json"):
        names = shards_in(folder / first)
    else:
        names = {first}
    if with_missing:
        return sorted(names)
    return sorted((names | set(ADAPTER)) & set(present))


def weights_are_complete(folder: Path) -> bool:
    """Whether a folder has a config.json, and every weight file that its index names."""
    indices = [folder / name for name in WEIGHTS if name.endswith(".json") and (folder / name).is_file()]
    single = any((folder / name).is_file() for name in WEIGHTS if not name.endswith(".json"))
    complete = single or any(_is_complete(folder, index) for index in indices)
    return complete and (folder / "config.json").is_file()


def _is_complete(folder: Path, index: Path) -> bool:
    shards = shards_in(index)
    return bool(shards) and all((folder / name).is_file() for name in shards)


def shards_in(index: Path) -> set[str]:
    """The files that an index of shards names; none if it cannot be read."""
    try:
        shards = parse_object(index.read_bytes()).get("weight_map")
    except (OSError, ValueError, RecursionError):
        return set()
    if not isinstance(shards, dict):
        return set()
    return {name for name in shards.values() if isinstance(name, str)}


def _hashes(folder: Path, files: list[Path]) -> dict[str, str]:
    """File name -> SHA-256 of its content, from a cache if size and times are unchanged."""
    folder_id = sha256(str(real_path(folder)).encode()).hexdigest()[:32]
    caches = [user_cache("bases") / f"{folder_id}.json"]
    # In the hub's cache, files are links, and nothing is written beside them.
    if not any(file.is_symlink() for file in files):
        caches.insert(0, folder / HASHES_FILE)
    cached: dict[str, Any] = {}
    for cache in reversed(caches):
        cached |= _read(cache)
    hashes: dict[str, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        hashes[file.name] = _cached_hash(cached.get(file.name), file) or _hash(file)
        entries[file.name] = {**_stamp(file), "sha256": hashes[file.name]}
    if any(cached.get(name) != entry for name, entry in entries.items()):
        _write({**cached, **entries}, caches)
    return hashes


def _stamp(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _cached_hash(entry: Any, file: Path) -> str | None:
    """The hash in a cache entry, if the entry is valid and the file has not changed since."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
        return None
    unchanged = all(entry.get(key) == value for key, value in _stamp(file).items())
    return entry["sha256"] if unchanged else None


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def _read(cache: Path) -> dict[str, Any]:
    try:
        return parse_object(cache.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}


def _write(content: Mapping[str, Any], caches: list[Path]) -> None:
    """Write to the first cache that is writable. Without one, the hashes are computed again the next time."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    for cache in caches:
        try:
            write_atomically(cache, lambda path: path.write_text(text, encoding="utf-8"))
        except UserError:
            continue
        return


def _config_hash(file: Path) -> str:
    try:
        content = parse_object(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    relevant = {key: value for key, value in content.items() if key not in IGNORED_KEYS}
    return sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
