"""Copies of adapter folders: named by content, unaffected by later changes, deleted with their server."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from peft import AdaLoraConfig, HiraConfig, LoraConfig
from safetensors.torch import load_file

from flora_train.config.errors import UserError
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.serving import snapshots
from flora_train.serving.adapter_files import read_adapter
from flora_train.serving.snapshots import FOLDER_VARIABLE, SnapshotStore
from tests.unit.serving.adapter_folders import CONFIG, WEIGHTS, change_config, change_tensors, saved_by_peft
from tests.unit.serving.damages import DAMAGES

HIRA = HiraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A HIRA folder."""
    return saved_by_peft(HIRA, tmp_path / "adapter")


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """A store of its own."""
    return SnapshotStore(tmp_path / "servers")


def test_equal_contents_are_one_copy_and_other_contents_another(
    store: SnapshotStore, adapter: Path, tmp_path: Path
) -> None:
    first = store.take(adapter)
    again = store.take(shutil.copytree(adapter, tmp_path / "elsewhere"))
    assert (again.folder, again.int_id) == (first.folder, first.int_id)
    change_tensors(adapter, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    other = store.take(adapter)
    assert other.folder != first.folder
    assert other.int_id != first.int_id
    assert store.take(adapter, salt="x").int_id != other.int_id
    assert sorted(store.folders()) == sorted(path for path in store.root.iterdir() if path.is_dir())


def test_every_file_counts(store: SnapshotStore, adapter: Path) -> None:
    ids = [store.take(adapter).int_id]
    (adapter / BASE_RECORD).write_text("{}")
    ids.append(store.take(adapter).int_id)
    change_config(adapter, hira_dropout=0.5)
    ids.append(store.take(adapter).int_id)
    (adapter / "README.md").write_text("not a part of the adapter")
    assert store.take(adapter).int_id == ids[-1]
    assert len(set(ids)) == 3
    assert all(2**20 <= int_id < 2**63 for int_id in ids)


def test_a_copy_outlives_its_source(store: SnapshotStore, adapter: Path) -> None:
    before = (adapter / WEIGHTS).read_bytes()
    copy = store.take(adapter)
    with (adapter / WEIGHTS).open("r+b") as file:  # changed in place, as safetensors does
        file.truncate(10)
    shutil.rmtree(adapter)
    assert (copy.folder / WEIGHTS).read_bytes() == before
    read_adapter(copy.folder)


def test_links_are_followed(store: SnapshotStore, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (adapter / WEIGHTS).rename(tmp_path / "blobs" / "1")
    (adapter / WEIGHTS).symlink_to(tmp_path / "blobs" / "1")
    (tmp_path / "link").symlink_to(adapter)
    copy = store.take(tmp_path / "link")
    assert not (copy.folder / WEIGHTS).is_symlink()
    read_adapter(copy.folder)


def test_adalora_is_copied_as_the_equal_lora(store: SnapshotStore, tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=2, target_r=2, total_step=10, target_modules=["q_proj"])
    copy = store.take(saved_by_peft(config, tmp_path / "adapter"))
    content = json.loads((copy.folder / CONFIG).read_text())
    assert content["peft_type"] == "LORA"
    assert all(".lora_" in name and name.endswith(".weight") for name in load_file(copy.folder / WEIGHTS))
    lora = read_adapter(copy.folder)
    assert getattr(lora, "converted", "") is None


def test_pickled_weights_are_copied_unless_there_are_better_ones(store: SnapshotStore, adapter: Path) -> None:
    import torch

    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    both = store.take(adapter)
    assert not (both.folder / "adapter_model.bin").exists()
    (adapter / WEIGHTS).unlink()
    read_adapter(store.take(adapter).folder)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
@pytest.mark.parametrize("config", [HIRA, LoraConfig(r=2, target_modules=["q_proj"])])
def test_damaged_folders_are_refused_and_leave_nothing(
    damage: object, reason: str, config: object, store: SnapshotStore, tmp_path: Path
) -> None:
    folder = saved_by_peft(config, tmp_path / "a")
    damage(folder)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"adapter = 'lua': .*({reason})"):
        store.take(folder, "lua")
    assert [path.name for path in store.root.iterdir()] == ["lock"]


def test_a_file_that_is_being_written_is_waited_for(
    store: SnapshotStore, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = snapshots._copy
    calls: list[str] = []

    def written_meanwhile(source: Path, target: Path) -> bytes:
        digest = original(source, target)
        calls.append(source.name)
        if len(calls) <= 3:
            os.utime(adapter / WEIGHTS, ns=(len(calls), len(calls)))
        return digest

    monkeypatch.setattr(snapshots, "_copy", written_meanwhile)
    monkeypatch.setattr(snapshots, "PAUSE", 0.0)
    read_adapter(store.take(adapter).folder)
    assert len(calls) == 6


def test_a_folder_that_never_rests_is_refused(
    store: SnapshotStore, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = snapshots._copy

    def written_meanwhile(source: Path, target: Path) -> bytes:
        (adapter / CONFIG).write_text((adapter / CONFIG).read_text())
        return original(source, target)

    monkeypatch.setattr(snapshots, "_copy", written_meanwhile)
    monkeypatch.setattr(snapshots, "PAUSE", 0.01)
    with pytest.raises(UserError, match="changes while it is read"):
        store.take(adapter)


def test_a_growing_file_has_a_limit(
    store: SnapshotStore, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(snapshots.LIMITS, WEIGHTS, 100)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is larger than 100 bytes"):
        store.take(adapter)


def test_concurrent_copies_of_one_content_are_one(store: SnapshotStore, adapter: Path) -> None:
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(store.take(adapter).folder)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1
    assert len([path for path in store.root.iterdir() if path.is_dir()]) == 1


def test_copies_are_dropped_unless_they_were_taken_again(store: SnapshotStore, adapter: Path) -> None:
    copy = store.take(adapter)
    store.drop(copy.folder, age=60.0)
    assert copy.folder.is_dir()
    store.drop(copy.folder)
    assert not copy.folder.exists()
    assert store.folders() == []
    assert store.take(adapter).folder.is_dir()


def test_a_server_deletes_its_copies_at_its_end(tmp_path: Path, adapter: Path) -> None:
    store = SnapshotStore(tmp_path / "servers")
    root = store.root
    store.take(adapter)
    del store
    gc.collect()
    assert not root.exists()


def test_the_copies_of_killed_servers_are_deleted_and_those_of_living_ones_stay(
    tmp_path: Path, adapter: Path
) -> None:
    above = tmp_path / "servers"
    script = (
        "import os, sys; from pathlib import Path; from flora_train.serving.snapshots import SnapshotStore; "
        "store = SnapshotStore(Path(sys.argv[1])); store.take(Path(sys.argv[2])); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(above), str(adapter)], check=False)
    (killed,) = (path for path in above.iterdir() if path.is_dir())
    (above / "notes").mkdir()
    living = SnapshotStore(above)
    copy = living.take(adapter)
    assert not killed.exists()
    other = SnapshotStore(above)
    assert copy.folder.is_dir()
    assert (above / "notes").is_dir()
    with (living.root / "lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    other.close()


def test_a_folder_that_cannot_hold_copies_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"{FOLDER_VARIABLE} = .*file': no copies of adapters can be kept"):
        SnapshotStore()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "chosen"))
    store = SnapshotStore()
    assert store.root.parent == tmp_path / "chosen"


def test_copies_that_somebody_deleted_are_one_error(store: SnapshotStore, adapter: Path) -> None:
    shutil.rmtree(store.root)
    with pytest.raises(UserError, match=r"cannot be copied to .*set FLORA_TRAIN_SNAPSHOTS"):
        store.take(adapter)
