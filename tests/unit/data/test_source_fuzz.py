"""Reading any file of rows ends with rows, or with one error that names it; loading a task likewise."""

from __future__ import annotations

import io
import json
import os
import tarfile
import wave
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.config.errors import UserError
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.audio.decode import ClipError, check_clip, decode
from flora_train.data.audio.speech_task import _lines
from flora_train.data.sources import READERS, read_rows
from flora_train.data.task import load_tasks
from tests.unit.data.conftest import byte_tokenizer, run_config

pytestmark = pytest.mark.attack

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud83d"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["text", "prompt", "completion", "path", "sentence", "\ud83d", ""]), VALUE
    ),
    max_size=5,
)
SEEDS = {
    ".jsonl": b'{"text": "one"}\n{"text": "tw\\u00fc"}\n',
    ".json": b'[{"text": "one"}, {"text": null, "a": [1.5]}]',
    ".csv": b'text,a\n"one, ""two""",3\n\xc3\xbc,\n',
    ".tsv": b'text\ta\n"one\t3\n',
    ".txt": b"one\ntwo\r\n\xc3\xbc\n\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def damaged(seed: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with parts of them replaced, or others altogether."""
    part = st.sampled_from(
        [
            b'"',
            b"\n",
            b",",
            b"\t",
            b"{",
            b"}",
            b"[",
            b"\0",
            b"\xff",
            b"\\",
            b"\r",
            b"\xef\xbb\xbf",
            b"9" * 5000,
            b'"text":1,',
        ]
    )
    edit = st.tuples(st.integers(0, len(seed)), st.integers(0, 8), part | st.binary(max_size=6))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = seed
        for at, cut, new in edits:
            content = content[:at] + new + content[at + cut :]
        return content

    return st.lists(edit, max_size=4).map(apply) | st.binary(max_size=60)


def rows_or_error(source: dict[str, Any]) -> list[dict[str, Any]]:
    said = "tasks.t.train"
    try:
        return read_rows(TaskConfig(train=source).train, said)
    except UserError as error:
        said = str(error)
    assert said.startswith(("tasks.t.train", "/"))  # the key, or a file
    assert "\n" not in said
    return []


@pytest.mark.parametrize("suffix", SEEDS)
@given(data=st.data())
def test_damaged_file_of_rows_is_rows_or_one_error(place: Path, suffix: str, data: st.DataObject) -> None:
    path = place / f"rows{suffix}"
    path.write_bytes(data.draw(damaged(SEEDS[suffix])))
    for row in rows_or_error({"files": [str(path)]}):
        assert all(isinstance(column, str) for column in row)


def test_every_kind_of_file_is_damaged_here() -> None:
    assert {*SEEDS, ".parquet"} == set(READERS)


@given(data=st.data())
def test_damaged_parquet_is_rows_or_one_error(place: Path, data: st.DataObject) -> None:
    out = io.BytesIO()
    table = pyarrow.Table.from_pylist(
        [{"text": "one", "n": 1.5, "s": {"a": [1]}}, {"text": None, "n": float("nan"), "s": None}]
    )
    pyarrow.parquet.write_table(table, out)
    seed = out.getvalue()
    at = data.draw(st.integers(0, len(seed) - 1))
    path = place / "rows.parquet"
    path.write_bytes(
        data.draw(st.sampled_from([seed[:at], seed[:at] + b"\0\xff" + seed[at + 2 :], seed[at:]]))
    )
    rows_or_error({"files": [str(path)]})


@given(
    rows=ROWS,
    settings=st.sampled_from([{}, {"text": "text"}, {"prompt": "{prompt}:", "completion": " {completion}"}]),
)
def test_rows_of_any_values_are_a_task_or_one_error(
    place: Path, rows: list[dict[str, Any]], settings: dict[str, str]
) -> None:
    path = place / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        tasks = load_tasks(
            run_config({"t": {"train": str(path), **settings}}), byte_tokenizer(), place / "cache"
        )
    except UserError:
        return
    assert tasks["t"].train.label_counts.min() >= 1
    assert (
        b"nan" not in byte_tokenizer().decode(tasks["t"].train.tokens).encode() or "nan" in path.read_text()
    )


@given(rows=ROWS.filter(bool))
def test_rows_of_clips_of_any_values_are_lines_or_one_error(place: Path, rows: list[dict[str, Any]]) -> None:
    path = place / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskConfig(train=str(path), speech={"language": "cs"})
    try:
        lines = _lines(
            read_rows(task.train, "tasks.t.train"),
            task.train,
            task,
            key="tasks.t.train",
            cache=place / "cache",
        )
    except UserError:
        return
    for line in lines:
        line.sentence.encode()
        check_clip(line.path)


def wav() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(b"\x01\x02" * 200)
    return out.getvalue()


@given(content=damaged(wav()))
def test_damaged_clip_is_samples_or_one_word_for_why_not(content: bytes) -> None:
    with suppress(ClipError):
        assert decode(content).ndim == 1


def test_pipe_or_device_as_a_clip_is_missing_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.wav")
    for name in (str(tmp_path / "clip.wav"), "/dev/zero", "a\0b", "x" * 5000, str(tmp_path)):
        assert check_clip(name).fault == "no such file"


def release() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text in (
            ("train", "path\tsentence\na.mp3\tone\n"),
            ("clip_durations", "clip\tduration[ms]\na.mp3\t\u00b2\n"),
        ):
            content = text.encode()
            entry = tarfile.TarInfo(f"cv-corpus-1/cs/{name}.tsv")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@given(content=damaged(release()) | st.just(release()))
def test_damaged_release_of_common_voice_is_rows_or_one_error(cache: Path, content: bytes) -> None:
    (cache / "cs.tar.gz").write_bytes(content)
    rows_or_error({"common_voice": str(cache / "cs.tar.gz"), "locale": "cs"})


@given(table=damaged(b"path\tsentence\na.mp3\tone\n"), durations=damaged(b"clip\tduration[ms]\na.mp3\t12\n"))
def test_damaged_tables_of_a_release_are_rows_or_one_error(
    place: Path, table: bytes, durations: bytes
) -> None:
    folder = place / "cv-corpus-2" / "cs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.tsv").write_bytes(table)
    (folder / "clip_durations.tsv").write_bytes(durations)
    rows_or_error({"common_voice": str(place / "cv-corpus-2"), "locale": "cs"})


@given(pattern=st.text(st.sampled_from("*?[]!/.ab{}-\0\\"), min_size=1, max_size=8))
def test_any_pattern_is_files_or_one_error(place: Path, pattern: str) -> None:
    (place / "tree" / "a").mkdir(parents=True, exist_ok=True)
    (place / "tree" / "a" / "b.txt").write_text("x")
    rows_or_error({"folder": str(place / "tree"), "glob": pattern})
    rows_or_error({"files": [f"{place}/tree/{pattern}"]})


@given(
    words=st.dictionaries(
        st.sampled_from(["split", "locale", "common_voice"]), st.text(min_size=1, max_size=6)
    )
)
def test_any_name_in_a_source_is_rows_or_one_error(place: Path, words: dict[str, str]) -> None:
    rows_or_error(
        SourceConfig(**{"common_voice": str(place), "locale": "cs", **words}).model_dump(
            exclude_defaults=True
        )
    )
