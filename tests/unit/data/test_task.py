"""Splits, samples and the cache of a task."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.data.task import Task
from flora_train.data.templates import PromptCompletion
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import tokenize
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.data.many_tokenizers import smollm2

ROWS = [{"text": f"text number {i}"} for i in range(100)]


def texts(split: TokenSplit, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(split.example(i)).removesuffix("<e>") for i in range(len(split))]


def same(one: TokenSplit, other: TokenSplit) -> bool:
    return (
        all(np.array_equal(a, b) for a, b in zip(astuple(one)[:4], astuple(other)[:4], strict=True))
        and one.counts == other.counts
    )


def cache_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}


def test_seeded_split_is_disjoint_whole_and_of_the_asked_size(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS)
    task = load(tokenizer, a={"train": "a.jsonl", "validation_fraction": 0.2})["a"]
    train, held = texts(task.train, tokenizer), texts(task.validation, tokenizer)
    assert (len(train), len(held)) == (80, 20)
    assert sorted(train + held) == sorted(row["text"] for row in ROWS)


def test_split_depends_on_the_seed_and_the_tasks_name_only(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS)
    source = {"train": "a.jsonl"}
    first = load(tokenizer, a=source)["a"]
    among_others = load(tokenizer, b=source, a={**source, "weight": 3}, c=source)
    assert same(first.train, among_others["a"].train)
    assert same(first.validation, among_others["a"].validation)
    assert not same(first.validation, among_others["b"].validation)
    assert not same(first.validation, load(tokenizer, seed=1, a=source)["a"].validation)


@pytest.mark.parametrize(("rows", "fraction", "held"), [(2, 0.99, 1), (2, 0.01, 1), (10, 0.99, 9)])
def test_split_of_few_rows_leaves_something_on_both_sides(
    write, load, tokenizer: Any, rows: int, fraction: float, held: int
) -> None:
    write("a.jsonl", ROWS[:rows])
    task = load(tokenizer, a={"train": "a.jsonl", "validation_fraction": fraction})["a"]
    assert (len(task.train), len(task.validation)) == (rows - held, held)


def test_single_row_cannot_be_split_and_says_so(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS[:1])
    with pytest.raises(UserError, match=r"tasks.a.train: has 1 row: none can be held out"):
        load(tokenizer, a={"train": "a.jsonl"})


def test_validation_source_leaves_all_training_rows(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS)
    write("v.jsonl", [{"text": "held"}])
    task = load(tokenizer, a={"train": "a.jsonl", "validation": "v.jsonl"})["a"]
    assert len(task.train) == 100
    assert texts(task.validation, tokenizer) == ["held"]


def test_limits_take_a_seeded_sample_of_each_side_and_count_the_rest(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS)
    write("v.jsonl", ROWS)
    limits = {"train": "a.jsonl", "validation": "v.jsonl", "max_examples": 10, "max_validation_examples": 5}
    task = load(tokenizer, a=limits)["a"]
    assert (len(task.train), task.train.counts.unsampled, task.train.counts.rows) == (10, 90, 100)
    assert (len(task.validation), task.validation.counts.unsampled) == (5, 95)
    assert texts(task.train, tokenizer) != [row["text"] for row in ROWS[:10]]
    assert same(task.train, load(tokenizer, a=limits)["a"].train)
    assert not same(task.train, load(tokenizer, seed=1, a=limits)["a"].train)


def test_second_load_takes_the_same_arrays_from_the_cache(
    write, load, tokenizer: Any, tmp_path: Path, monkeypatch
) -> None:
    write("a.jsonl", ROWS)
    first = load(tokenizer, a={"train": "a.jsonl"})["a"]
    before = cache_files(tmp_path)
    assert len(before) == 2
    monkeypatch.setattr(
        "flora_train.data.text_splits._Builder._build", lambda *_: pytest.fail("tokenised again")
    )
    again = load(tokenizer, a={"train": "a.jsonl"})["a"]
    assert same(first.train, again.train)
    assert same(first.validation, again.validation)
    assert first.data_hash == again.data_hash
    assert cache_files(tmp_path) == before


def change_content(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"text": "other"}, *rows[1:]]


@pytest.mark.parametrize(
    "change", ["content", "tokenizer", "end token", "max_length", "truncation", "template"]
)
def test_cache_key_covers_everything_that_changes_the_tokens(
    write, load, tmp_path: Path, change: str
) -> None:
    write("a.jsonl", ROWS)
    task, tokenizer = {"train": "a.jsonl", "validation": "a.jsonl"}, byte_tokenizer()
    first = load(tokenizer, a=task)["a"]
    before = cache_files(tmp_path)
    if change == "content":
        write("a.jsonl", change_content(ROWS))
    elif change == "tokenizer":
        tokenizer = byte_tokenizer(merges=(("e", "x"),))
    elif change == "end token":
        tokenizer.eos_token = "<s>"
    elif change == "template":
        task = {**task, "text": "# {text}"}
    elif change == "truncation":
        task = {**task, "truncation": "drop"}
    second = load(tokenizer, max_length=8 if change == "max_length" else 64, a=task)["a"]
    after = cache_files(tmp_path)
    assert before.items() < after.items()
    assert first.data_hash != second.data_hash
    if change != "truncation":  # here no example is over-long
        assert not same(first.train, second.train)


def test_cache_does_not_depend_on_where_the_rows_come_from(
    write, load, tokenizer: Any, tmp_path: Path
) -> None:
    write("a.jsonl", ROWS)
    write("b.json", "[" + ",".join(f'{{"text": "{row["text"]}"}}' for row in ROWS) + "]")
    load(tokenizer, a={"train": "a.jsonl", "validation": "a.jsonl"})
    before = cache_files(tmp_path)
    load(tokenizer, z={"train": "b.json", "validation": "b.json", "weight": 5})
    assert cache_files(tmp_path) == before


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "other archive", "flipped"])
def test_damaged_cache_file_is_made_again(write, load, tokenizer: Any, tmp_path: Path, damage: str) -> None:
    write("a.jsonl", ROWS)
    first = load(tokenizer, a={"train": "a.jsonl"})["a"]
    for path in (tmp_path / "cache").iterdir():
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 3] ^= 0xFF
        if damage == "other archive":
            with path.open("wb") as file:
                np.savez(file, tokens=np.zeros(3))
        else:
            path.write_bytes(
                {
                    "empty": b"",
                    "cut": whole[: len(whole) // 2],
                    "noise": b"noise" * 99,
                    "flipped": bytes(flipped),
                }[damage]
            )
    again = load(tokenizer, a={"train": "a.jsonl"})["a"]
    assert same(first.train, again.train)
    assert same(first.validation, again.validation)
    assert all(same(TokenSplit.load(path), split) for path, split in by_size(tmp_path, again))


def by_size(folder: Path, task: Task) -> list[tuple[Path, TokenSplit]]:
    """Each cache file with the split that it holds: the validation's is the smaller."""
    paths = sorted((folder / "cache").iterdir(), key=lambda path: path.stat().st_size)
    return list(zip(paths, [task.validation, task.train], strict=True))


def test_cache_that_cannot_be_written_costs_a_warning_not_the_run(
    write, load, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write("a.jsonl", ROWS)
    write("cache", "a file where the folder should be")
    task = load(tokenizer, a={"train": "a.jsonl"})["a"]
    assert "tokens are not cached" in caplog.text
    assert len(task.train) == 95


def test_full_disk_leaves_no_half_written_cache_file(
    write,
    load,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    write("a.jsonl", ROWS)
    monkeypatch.setattr("flora_train.data.array_file.os.fsync", full)
    load(tokenizer, a={"train": "a.jsonl"})
    assert "the disk is full" in caplog.text
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("rows", "task", "reason"),
    [
        (
            [{"text": " "}, {"text": ""}, {}],
            {},
            "no usable example among 3 rows: 3 empty, 0 over-long, 0 with a prompt",
        ),
        (
            [{"text": "x" * 70}] * 2,
            {"truncation": "drop"},
            "no usable example among 2 rows: 0 empty, 2 over-long, 0 with a prompt",
        ),
        (
            [{"prompt": "x" * 70, "completion": "y"}],
            {},
            "1 with a prompt of training.max_length = 64 tokens or more",
        ),
    ],
)
def test_data_without_a_usable_example_is_an_error_with_the_counts(
    write, load, tokenizer: Any, rows: list[Any], task: dict[str, str], reason: str
) -> None:
    write("a.jsonl", rows)
    with pytest.raises(UserError) as caught:
        load(tokenizer, a={"train": "a.jsonl", "validation": "a.jsonl", **task})
    assert str(caught.value).startswith("tasks.a.train: no usable example ")
    assert reason in str(caught.value)


def test_validation_rows_must_have_the_training_rows_columns(write, load, tokenizer: Any) -> None:
    write("a.jsonl", [{"prompt": "p", "completion": "c"}])
    write("v.jsonl", [{"text": "t"}])
    with pytest.raises(
        UserError,
        match=r"tasks.a.prompt = 'prompt': 'prompt' is not a column of the validation rows; they have text",
    ):
        load(tokenizer, a={"train": "a.jsonl", "validation": "v.jsonl"})


def test_errors_of_all_tasks_are_reported_together(write, load, tokenizer: Any) -> None:
    write("good.jsonl", ROWS)
    write("empty.jsonl", "")
    tasks = {
        "a": {"train": "none.jsonl", "validation": "none either.jsonl"},
        "b": {"train": "empty.jsonl"},
        "c": {"train": "good.jsonl", "text": "code"},
        "d": {"train": "good.jsonl"},
    }
    with pytest.raises(UserError) as caught:
        load(tokenizer, **tasks)
    assert [problem.key for problem in caught.value.problems] == [
        "tasks.a.train",
        "tasks.a.validation",
        "tasks.b.train",
        "tasks.c.text",
    ]


def test_missing_numbers_are_counted_as_empty_and_never_learnt(write, load, tokenizer: Any) -> None:
    rows = [{"question": f"{i}?", "answer": float("nan") if i % 3 == 0 else str(i)} for i in range(30)]
    write("a.jsonl", rows)
    task = load(
        tokenizer,
        a={"train": "a.jsonl", "validation": "a.jsonl", "prompt": "question", "completion": " {answer}"},
    )["a"]
    assert (task.train.counts.empty, task.train.counts.examples) == (10, 20)
    assert "nan" not in "".join(texts(task.train, tokenizer))


@pytest.mark.parametrize("truncation", ["truncate", "drop"])
def test_long_text_is_tokenised_only_as_far_as_it_is_used(truncation: str) -> None:
    tokenizer, text = smollm2(), "many words of text, " * 5_000_000
    tokenize([PromptCompletion("", "warm up")], tokenizer, 64, truncation=truncation)
    before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    examples = [
        PromptCompletion("", text, (), ((0, len(text)),)),
        PromptCompletion(text, "too long a prompt", ((0, len(text)),)),
    ]
    split = tokenize(examples, tokenizer, 512, truncation=truncation)
    assert time.process_time() - before < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024  # KiB
    assert split.counts.prompt_too_long == 1
    assert split.counts.over_long_dropped == (truncation == "drop")
    if truncation == "truncate":
        assert split.example(0).tolist() == tokenizer(text[:8000])["input_ids"][:512]


def test_a_long_text_is_split_in_windows_as_it_would_be_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = smollm2(), "one, two; \u00fcber drei\n    vier {x} 5678 \u8a9e " * 1500
    example = PromptCompletion("", text, (), ((0, len(text)),))
    at_once = tokenize([example], tokenizer, 256, truncation="split")
    for name, size in (("LONGEST_WHOLE", 10_000), ("WINDOW", 5_000)):
        monkeypatch.setattr(f"flora_train.data.token_cache.{name}", size)
    in_windows = tokenize([example], tokenizer, 256, truncation="split")
    assert same(in_windows, at_once)
    assert len(at_once) > 100


@pytest.mark.attack
def test_memory_for_splitting_a_long_text_stays_a_few_bytes_a_character() -> None:
    tokenizer, text = smollm2(), "many words of text, " * 200_000
    tokenize([PromptCompletion("", "words of text, " * 10_000)], tokenizer, 512, truncation="split")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(tokenize([PromptCompletion("", text)], tokenizer, 512, truncation="split")) > 1500
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < 16 * len(text)
