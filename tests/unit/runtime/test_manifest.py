"""The manifest names what a run wrote, and nothing of anybody else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_train.runtime.manifest import RUN_FILES, Manifest, delete, suite_files

OURS = [
    "metrics.jsonl",
    "checkpoints/step-00000012.safetensors",
    "checkpoints/.step-00000013.safetensors.4711.tmp",
    "checkpoints/best/lua-flora.safetensors",
    "adapters/lua-flora/adapter_config.json",
    "adapters/.lua-flora.4711.tmp/adapter_config.json",
    "adapters/lua-flora/.README.md.12.tmp",
    "eval/heldout/pieces-3.jsonl",
    "eval/heldout/embeddings-law-0/pieces-1.jsonl",
    "eval/starter/completions-0.jsonl",
]
FOREIGN = [
    "notes.txt",
    "metrics.jsonl.bak",
    "checkpoints/step-best.safetensors",
    "checkpoints/step-00000012.safetensors.copy",
    "checkpoints/best/other.safetensors",
    "adapters/other/adapter_config.json",
    "adapters/lua-flora/sub/adapter_config.json",
    "inner/metrics.jsonl",
    "inner/adapters/lua-flora/adapter_config.json",
    "eval/other/completions-0.jsonl",
]


def folder_with(tmp_path: Path, names: list[str]) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
    return tmp_path


def test_manifest_finds_its_own_files_and_what_a_kill_left_of_them(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, OURS + FOREIGN)
    manifest = Manifest.of(["lua-flora"], (*RUN_FILES, *suite_files(["starter"])))
    found = manifest.files(folder)
    assert sorted(str(path.relative_to(folder)) for path in found) == sorted(OURS)
    delete(found, folder)
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == sorted(FOREIGN)
    assert not (folder / "eval" / "heldout").exists()


@pytest.mark.parametrize(
    "content",
    [
        None,
        3,
        {},
        {"names": [], "adapters": 3},
        {"names": ["/etc/passwd"], "adapters": []},
        {"names": ["../x"], "adapters": []},
        {"names": ["a/../../x"], "adapters": []},
        {"names": ["a/{adapter}"], "adapters": ["../x"]},
        {"names": ["{adapter}/{adapter}"], "adapters": ["x"]},
        {"names": ["{rest}{rest}"], "adapters": []},
        {"names": [""], "adapters": []},
        {"names": ["x\0"], "adapters": []},
    ],
    ids=str,
)
def test_manifest_that_could_name_files_elsewhere_is_none(content: Any) -> None:
    assert Manifest.read(content) is None


def test_manifest_does_not_follow_links(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "run"
    folder_with(elsewhere, ["lua-flora/adapter_config.json"])
    folder.mkdir()
    (folder / "adapters").symlink_to(elsewhere)
    manifest = Manifest.of(["lua-flora"])
    assert manifest.files(folder) == []
    assert manifest.links(folder) == [folder / "adapters"]


def test_manifest_reads_what_it_writes() -> None:
    manifest = Manifest.of(["b", "a"], ["x", "y/{adapter}"])
    assert Manifest.read(manifest.to_json()) == manifest
    assert (manifest | Manifest.of(["c"], ["z"])).to_json() == {
        "names": ["x", "y/{adapter}", "z"],
        "adapters": ["a", "b", "c"],
    }
