"""Files of arrays hold what was written, whether it was large or small, and damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.config.errors import UserError
from flora_train.data import array_file
from flora_train.data.array_file import ArrayWriter, blocks, load_arrays, write_arrays

ARRAYS = {
    "tokens": np.arange(1000, dtype=np.int32),
    "empty": np.empty((0, 2), dtype=np.int32),
    "spans": np.arange(22, dtype=np.int64).reshape(-1, 2),
    "texts": np.array(["one", "two \u00fc"]),
    "labels": np.array([True, False, True]),
}


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("small", [0, 1 << 18])
def test_arrays_are_what_was_written_and_cannot_be_changed(
    tmp_path: Path, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_file, "SMALL", small)
    write_arrays(tmp_path / "a", ARRAYS, {"rows": 3})
    arrays, facts = load_arrays(tmp_path / "a")
    assert alike(arrays, ARRAYS)
    assert facts == {"rows": 3}
    assert not any(array.flags.writeable for array in arrays.values() if array.size)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("in_memory", [10, 500, 1 << 20])
def test_arrays_that_grow_are_the_same_on_disk_and_in_memory(
    tmp_path: Path, in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_file, "IN_MEMORY", in_memory)
    types = {"tokens": (np.int32, ()), "spans": (np.int64, (2,))}
    results = []
    for path in (tmp_path / "sub" / "a", None):
        with ArrayWriter(path, types) as writer:
            for part in range(10):
                writer.append(tokens=np.arange(part * 7), spans=np.full((part % 3, 2), part))
            results.append(writer.finish({}, numbers=np.arange(4)))
    assert alike(*results)
    assert len(results[0]["tokens"]) == 7 * 45
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a"]
    assert alike(load_arrays(tmp_path / "sub" / "a")[0], results[0])


def test_a_writer_that_is_left_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_file, "IN_MEMORY", 10)

    def write() -> None:
        with ArrayWriter(tmp_path / "a", {"tokens": (np.int32, ())}) as writer:
            writer.append(tokens=np.arange(100))
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error_while_large_arrays_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_file, "IN_MEMORY", 10)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(array_file, "temporary_name", lambda path: full)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)

    def write() -> None:
        with ArrayWriter(tmp_path / "a", {"tokens": (np.int32, ())}) as writer:
            for _ in range(100):
                writer.append(tokens=np.arange(10_000))

    with pytest.raises(UserError, match="the disk is full"):
        write()
    assert list(tmp_path.iterdir()) == []


@given(at=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_damage_is_found(tmp_path_factory: pytest.TempPathFactory, at: float, cut: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    write_arrays(path, ARRAYS, {"rows": 3})
    content = bytearray(path.read_bytes())
    place = int(at * len(content))
    content[place] ^= 0x10
    path.write_bytes(content[:place] if cut else content)
    try:
        arrays, facts = load_arrays(path)
    except ValueError:
        return
    assert alike(arrays, ARRAYS)  # the byte was between two arrays
    assert facts == {"rows": 3}


def test_abandoned_files_of_killed_processes_are_deleted_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of other contents, which need not be made again: they may be large."""
    monkeypatch.setattr(array_file, "ABANDONED", -1.0)
    names = ("a.tokens.999999999", "a.tokens.1", "b.tokens.999999999", "b.other.999999999")
    dead, alive, dead_other, unrelated = (tmp_path / f".{name}.tmp" for name in names)
    for path in (dead, alive, dead_other, unrelated):
        path.touch()
    write_arrays(tmp_path / "a.tokens", ARRAYS, {})
    assert [path.exists() for path in (dead, alive, dead_other, unrelated)] == [False, True, False, True]


def test_blocks_are_the_array() -> None:
    assert np.concatenate(list(blocks(np.arange(10), 3))).tolist() == list(range(10))
