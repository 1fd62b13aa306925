"""The hash of a base covers the files that transformers loads, and never returns an outdated value."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flora_train.config.model_schema import ModelConfig
from flora_train.models import base_identity as base_files
from flora_train.models.base_identity import HASHES_FILE, base_identity, weight_files


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def identity(folder: Path) -> dict[str, str]:
    found = base_identity(ModelConfig(path=str(folder)))
    assert found is not None
    return found


def test_base_identity_reads_a_file_once_and_again_when_it_has_changed(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = base_files._hash
    monkeypatch.setattr(base_files, "_hash", lambda file: (read.append(file.name), whole(file))[1])
    first = identity(base)
    assert identity(base) == first
    assert read == ["model.safetensors"]
    before = (base / "model.safetensors").stat()
    (base / "model.safetensors").write_bytes(b"WEIGHTS")
    os.utime(base / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identity(base)["weights"] != first["weights"]


def test_base_identity_is_of_what_is_loaded_and_of_what_its_configuration_computes(base: Path) -> None:
    first = identity(base)
    (base / "notes.bin").write_bytes(b"not loaded")
    (base / "config.json").write_text(
        '{"model_type": "llama", "dtype": "bfloat16", "transformers_version": "6"}'
    )
    assert identity(base) == first
    (base / "config.json").write_text('{"model_type": "llama", "rope_theta": 1.0}')
    assert identity(base)["config"] != first["config"]
    (base / "adapter_model.safetensors").write_bytes(b"on top")
    assert identity(base)["weights"] != first["weights"]


def test_base_identity_of_shards_follows_their_index(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    )
    for name in ("one", "two", "three"):
        (base / f"{name}.safetensors").write_bytes(name.encode())
    assert [path.name for path in weight_files(base)] == ["one.safetensors", "two.safetensors"]
    first = identity(base)
    (base / "two.safetensors").write_bytes(b"2")
    assert identity(base) != first


@pytest.mark.parametrize(
    "content", ["", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"sha256": "0"}}', "[" * 100_000]
)
def test_base_identity_does_not_trust_a_damaged_cache(base: Path, content: str) -> None:
    first = identity(base)
    (base / HASHES_FILE).write_text(content)
    assert identity(base) == first


def test_base_identity_is_kept_in_the_user_cache_where_the_base_cannot_be_written_to(
    base: Path, tmp_path: Path
) -> None:
    (base / HASHES_FILE).mkdir()  # as root, no permission stops a write: something in the way does
    first = identity(base)
    (kept,) = (tmp_path / "cache" / "flora_train" / "bases").iterdir()
    assert json.loads(kept.read_text())["model.safetensors"]["sha256"] == first["weights"]


def test_base_identity_of_a_hub_snapshot_follows_links_to_blobs(base: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (base / "model.safetensors").rename(blobs / "b1")
    (base / "model.safetensors").symlink_to(blobs / "b1")
    first = identity(base)
    assert not (base / HASHES_FILE).exists()
    (blobs / "b2").write_bytes(b"others!")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(blobs / "b2")
    assert identity(base) != first


def test_base_identity_is_none_where_the_files_are_not_here(tmp_path: Path) -> None:
    assert base_identity(ModelConfig(path=str(tmp_path / "nowhere"))) is None
    assert base_identity(ModelConfig(path="nobody/nothing-at-all")) is None
