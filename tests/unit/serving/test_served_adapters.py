"""Contents are never mixed under one name, and a copy stays for as long as a request may need it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import HiraConfig

from flora_train.config.errors import UserError
from flora_train.serving.served_adapters import GRACE, AdapterKey, ServedAdapter, ServedAdapters, client_name
from flora_train.serving.snapshots import SnapshotStore
from tests.unit.serving.adapter_folders import change_tensors, saved_by_peft


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def adapters(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> ServedAdapters:
    monkeypatch.setattr("flora_train.serving.snapshots.time.monotonic", clock)
    return ServedAdapters(SnapshotStore(tmp_path / "servers"), clock)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A HIRA folder."""
    return saved_by_peft(HiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")


def rewrite(folder: Path) -> None:
    change_tensors(folder, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})


def admitted(adapters: ServedAdapters, key: AdapterKey) -> ServedAdapter:
    served = adapters.copy(key, Path(key.path))
    adapters.admit(key, served)
    return served


def test_each_content_has_a_name_an_id_and_a_path_of_its_own(adapters: ServedAdapters, folder: Path) -> None:
    key = AdapterKey("lua", 1, str(folder))
    first = admitted(adapters, key)
    assert first.name == "lua"
    assert adapters.get(key) == first
    assert not first.source_has_changed
    rewrite(folder)
    assert first.source_has_changed
    second = admitted(adapters, key)
    assert adapters.get(key) == second
    for part in ("name", "int_id", "path"):
        assert getattr(first, part) != getattr(second, part)
    assert second.name.startswith("lua@")
    assert Path(first.path).is_dir()


def test_the_same_content_under_two_names_is_one_copy(adapters: ServedAdapters, folder: Path) -> None:
    lua = admitted(adapters, AdapterKey("lua", 1, str(folder)))
    ruby = admitted(adapters, AdapterKey("ruby", 2, str(folder)))
    assert (lua.name, ruby.name) == ("lua", "ruby")
    assert lua.path == ruby.path
    assert adapters.serves(lua)
    adapters.forget(name="lua")
    assert adapters.serves(ruby)
    assert adapters.get(AdapterKey("ruby", 2, str(folder))) == ruby


def test_a_content_that_was_not_admitted_takes_no_name(adapters: ServedAdapters, folder: Path) -> None:
    key = AdapterKey("lua", 1, str(folder))
    adapters.copy(key, folder)
    rewrite(folder)
    assert admitted(adapters, key).name == "lua"
    assert client_name("lua@0123abcd") == client_name("lua") == "lua"
    assert client_name("lua@home") == "lua@home"


def test_a_bad_content_leaves_the_good_one(adapters: ServedAdapters, folder: Path) -> None:
    key = AdapterKey("lua", 1, str(folder))
    good = admitted(adapters, key)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="adapter = 'lua': is not a PEFT adapter"):
        adapters.copy(key, folder)
    assert adapters.get(key) == good
    assert Path(good.path).is_dir()


def test_ids_are_translated_in_both_directions(adapters: ServedAdapters, folder: Path) -> None:
    served = admitted(adapters, AdapterKey("lua", 7, str(folder)))
    assert adapters.client_ids([served.int_id]) == {7}
    assert adapters.engine_ids(7) == [served.int_id]
    assert adapters.client_ids([3, served.int_id]) == {3, 7}
    admitted(adapters, AdapterKey("ruby", 8, str(folder)))
    assert adapters.client_ids([served.int_id]) == {7, 8}
    adapters.forget(int_id=8)
    assert adapters.client_ids([]) == set()
    assert adapters.engine_ids(3) == [3]
    assert adapters.forget(int_id=7) == [served]
    assert adapters.engine_ids(7) == [7]


def test_another_path_replaces_the_first(adapters: ServedAdapters, folder: Path, tmp_path: Path) -> None:
    first = AdapterKey("lua", 7, str(folder))
    second = AdapterKey("lua", 7, str(shutil.copytree(folder, tmp_path / "other")))
    admitted(adapters, first)
    admitted(adapters, second)
    assert adapters.get(first) is None
    assert adapters.get(second) is not None


def test_a_copy_is_deleted_when_nothing_has_needed_it_for_a_while(
    adapters: ServedAdapters, folder: Path, clock: Clock
) -> None:
    key = AdapterKey("lua", 1, str(folder))
    old = admitted(adapters, key)
    rewrite(folder)
    new = admitted(adapters, key)

    def after(seconds: float, running: list[str]) -> bool:
        clock.now += seconds
        adapters.delete_unneeded(running)
        assert Path(new.path).is_dir()
        return Path(old.path).is_dir()

    assert after(10 * GRACE, [old.path])
    assert after(10 * GRACE, [])
    assert after(GRACE - 1, [])
    with adapters.in_admission(old):
        assert after(10 * GRACE, [])
    assert after(GRACE, [])
    assert not after(GRACE + 1, [])
    adapters.forget(name="lua")
    adapters.keep(new)
    assert not after(GRACE, [])
    assert not after(10 * GRACE, [])


def test_a_copy_that_is_taken_again_stays(adapters: ServedAdapters, folder: Path, clock: Clock) -> None:
    key = AdapterKey("lua", 1, str(folder))
    served = admitted(adapters, key)
    adapters.forget(name="lua")
    adapters.delete_unneeded([])
    clock.now += GRACE
    again = adapters.copy(key, folder)
    clock.now += 1
    adapters.delete_unneeded([])
    assert again.path == served.path
    assert Path(again.path).is_dir()
