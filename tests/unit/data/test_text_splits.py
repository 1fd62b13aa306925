"""Rows in a stream give the tokens, splits and hashes of rows in memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.data import array_file, row_groups, text_splits
from flora_train.data.documents import LocatedRow
from flora_train.data.packing import pack
from flora_train.data.row_survey import survey_rows, with_progress
from flora_train.data.splits import hold_out, hold_out_rows, sample, sample_rows, seed_of
from flora_train.data.templates import PromptCompletion
from flora_train.data.tokenization import tokenize
from tests.unit.data.test_task import same

ROWS = [{"prompt": f"{i}? ", "completion": "word " * (i % 9)} for i in range(300)]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is done in small steps, and on disk."""
    monkeypatch.setattr(text_splits, "CHUNK_ROWS", 7)
    monkeypatch.setattr(text_splits, "MANY_ROWS", 10)
    monkeypatch.setattr(array_file, "IN_MEMORY", 100)
    monkeypatch.setattr(array_file, "SMALL", 0)
    monkeypatch.setattr(row_groups, "IN_MEMORY", 10)


@pytest.mark.parametrize("count", [2, 3, 50, 1001])
@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_rows_are_held_out_and_sampled_by_index_as_in_lists(count: int, fraction: float) -> None:
    for seed in range(5):
        held_out = hold_out_rows(count, fraction, seed, key="t")
        in_lists = hold_out(range(count), fraction, seed, key="t")
        for rows, listed in zip(held_out, in_lists, strict=True):
            assert rows.tolist() == listed
            for limit in (None, 1, 10, 10_000):
                assert sample_rows(rows, limit, seed).tolist() == sample(listed, limit, seed)


def is_mapped(array: Any) -> bool:
    """Whether an array is a view of a mapped file."""
    while array is not None and not isinstance(array, mmap):
        array = getattr(array, "base", None)
    return array is not None


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_in_a_stream_are_those_of_all_rows_at_once(
    write, load, tokenizer: Any, small_chunks: None, packing: bool, tmp_path: Path
) -> None:
    write("a.jsonl", ROWS)
    limits = {"max_examples": 100, "max_validation_examples": 20, "validation_fraction": 0.2}
    task = load(tokenizer, max_length=40, a={"train": "a.jsonl", "packing": packing, **limits})["a"]
    train, held = hold_out(ROWS, 0.2, seed_of(0, "a", "split"), key="a")
    for name, rows, limit in (("train", train, 100), ("validation", held, 20)):
        chosen = sample(rows, limit, seed_of(0, "a", name))
        examples = [PromptCompletion(row["prompt"], row["completion"]) for row in chosen]
        at_once = tokenize(examples, tokenizer, 40, truncation="truncate", unsampled=len(rows) - len(chosen))
        if packing and name == "train":
            at_once = pack(at_once, 40)
        split = getattr(task, name)
        assert split.counts == at_once.counts
        assert len(split) == len(at_once)
        for i in range(len(split)):
            for one, other in zip(split.documents(i), at_once.documents(i), strict=True):
                assert np.array_equal(one[0], other[0])
                assert np.array_equal(one[1], other[1])
            assert split.length(i) == split.lengths[i] == len(split.example(i))
            assert split.label_count(i) == split.label_counts[i]
    assert is_mapped(task.train.tokens)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".tokens"}


@pytest.mark.parametrize("split_by", [None, "half"])
def test_small_steps_change_neither_tokens_nor_hash(
    write, load, tokenizer: Any, request: pytest.FixtureRequest, split_by: str | None, tmp_path: Path
) -> None:
    write("a.jsonl", [{**row, "half": i % 2} for i, row in enumerate(ROWS)])
    task = {"train": "a.jsonl", "validation": "a.jsonl", "max_examples": 50}
    if split_by:
        task |= {"split_by": "half", "split_value": "1"}
    at_once = load(tokenizer, a=task)["a"]
    shutil.rmtree(tmp_path / "cache")
    request.getfixturevalue("small_chunks")
    in_steps = load(tokenizer, a=task)["a"]
    assert at_once.data_hash == in_steps.data_hash
    assert same(at_once.train, in_steps.train)
    assert same(at_once.validation, in_steps.validation)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_hash_is_of_the_rows_not_of_the_file(write, load, tokenizer: Any, kind: str) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    rows = [{"text": f"{i}, \u00fc"} for i in range(50)]
    write("a.jsonl", rows)
    first = load(tokenizer, a={"train": "a.jsonl"})["a"]
    table = pyarrow.Table.from_pylist(rows)
    path = write(f"b.{kind}", rows)
    if kind == "csv":
        pyarrow.csv.write_csv(table, path)
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    assert load(tokenizer, a={"train": f"b.{kind}"})["a"].data_hash == first.data_hash
    write("a.jsonl", [*rows[:-1], {"text": "other"}])
    assert load(tokenizer, a={"train": "a.jsonl"})["a"].data_hash != first.data_hash


def test_rows_that_change_while_they_are_read_are_an_error(
    write, load, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_chunks: None
) -> None:
    path = write("a.jsonl", ROWS)
    survey = text_splits.survey_rows
    changed: list[Any] = []

    def survey_then_change(*words: Any) -> Any:
        surveyed = survey(*words)
        write("a.jsonl", changed)
        return surveyed

    monkeypatch.setattr(text_splits, "survey_rows", survey_then_change)
    for content in ([*ROWS, ROWS[0]], ROWS[:-1], [*ROWS[:17], ROWS[18], *ROWS[18:]]):
        changed[:] = content
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        with pytest.raises(UserError, match=r"tasks\.a\.train.*changed while it was read"):
            load(tokenizer, a={"train": "a.jsonl"})
        assert list((tmp_path / "cache").iterdir()) == []


def test_large_tokens_go_elsewhere_where_the_cache_cannot_be_written(
    write,
    load,
    tokenizer: Any,
    small_chunks: None,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    write("a.jsonl", ROWS)
    write("cache", "a file where the folder should be")
    task = load(tokenizer, a={"train": "a.jsonl"})["a"]
    assert "tokens are not cached" in caplog.text
    assert len(task.train) == task.train.counts.examples > 200
    assert task.train.tokens.max() > 0
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_disk_without_room_for_the_tokens_is_an_error_before_it_is_full(
    write, load, tokenizer: Any, small_chunks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("a.jsonl", ROWS)
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr(text_splits.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"the tokens of tasks\.a need .* GB more: set XDG_CACHE_HOME"):
        load(tokenizer, a={"train": "a.jsonl"})
    assert list((tmp_path / "cache").iterdir()) == []


def slow_rows(count: int, seconds: float) -> Iterator[LocatedRow]:
    for number in range(1, count + 1):
        time.sleep(seconds)
        yield LocatedRow({"text": str(number)}, "slow", number)


def test_reading_shows_progress_within_the_first_second(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flora_train.data.row_survey.CHECKED_EVERY", 1)
    caplog.set_level(logging.INFO)
    began = time.time()
    survey = survey_rows(slow_rows(150, 0.01), "t (train)", tmp_path)
    assert len(survey) == 150
    (line,) = [record for record in caplog.records if record.message.startswith("read t (train): ")]
    assert line.created - began < 1.0
    assert "rows " in line.message


def test_reading_that_takes_no_time_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert len(list(with_progress(slow_rows(1000, 0), "t"))) == 1000
    assert caplog.text == ""


MEASURE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from large_data import PeakMemory
from tests.unit.data.conftest import byte_tokenizer, run_config
from flora_train.data.task import load_tasks

memory = PeakMemory()
memory.start()
config = run_config({"t": {"train": sys.argv[1], "packing": sys.argv[3] == "packed"}}, max_length=512)
task = load_tasks(config, byte_tokenizer(), Path(sys.argv[2]))["t"]
print(json.dumps([memory.stop(), len(task.train), task.train.counts.tokens]))
"""


@pytest.mark.full
@pytest.mark.parametrize("packing", ["unpacked", "packed"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, packing: str) -> None:
    """RssAnon for 200,000 rows of 200 tokens is at most 60 MB above that for 10,000; the tokens alone have
    160 MB.

    The tokenizer runs on one thread, because its threads keep about 80 MB more from some 20,000 rows on,
    however many follow (the next test).
    """
    small, large = (peak_of(tmp_path, count, packing) for count in (10_000, 200_000))
    assert large - small < 60e6


@pytest.mark.full
def test_memory_of_the_tokenizer_s_threads_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    small, large = (peak_of(tmp_path, count, "unpacked", threads=True) for count in (20_000, 200_000))
    assert large - small < 60e6


def peak_of(folder: Path, count: int, packing: str, *, threads: bool = False) -> int:
    """Largest RssAnon, in bytes, of a process that loads `count` rows of 200 tokens."""
    path = folder / f"{count}.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"text": f"{i:0199}"}) + "\n" for i in range(count))
    command = [sys.executable, "-c", MEASURE, str(path), str(folder / f"cache{count}"), packing]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": str(threads).lower()}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, examples, tokens = json.loads(done.stdout)
    assert tokens == 200 * round(count * 0.95)
    assert (examples < count * 0.6) == (packing == "packed")
    return int(peak)


TWICE = """
import sys
from pathlib import Path
from tests.unit.data.conftest import byte_tokenizer, run_config
from flora_train.data import text_splits
from flora_train.data.task import load_tasks

if sys.argv[3] != "0":
    text_splits.is_main_process = lambda: False
build = text_splits._Builder._build
def counted(self, *words):
    print("tokenizes", flush=True)
    return build(self, *words)
text_splits._Builder._build = counted
task = load_tasks(run_config({"t": {"train": sys.argv[1]}}), byte_tokenizer(), Path(sys.argv[2]))["t"]
print(task.data_hash, len(task.train))
"""


@pytest.mark.full
def test_of_two_processes_one_makes_the_tokens_and_both_have_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:0150}"}) + "\n" for i in range(40_000)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE, str(path), str(tmp_path / "cache"), str(rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(output.count("tokenizes") for output in outputs) == 1
    assert outputs[0][-2] == outputs[1][-2]
