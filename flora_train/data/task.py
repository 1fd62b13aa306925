"""What is a task, once read? Its tokenised training and held-out examples, from disk cache where nothing changed."""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import Problem, UserError, fail
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.examples import TextExample, make_formatter
from flora_train.data.packing import pack
from flora_train.data.sources import Row, read_rows, source_files
from flora_train.data.tokens import TokenSplit, tokenise

CACHE_VERSION = 3


@dataclass(frozen=True)
class Task:
    """One task of the run."""

    name: str
    weight: float
    train: TokenSplit
    validation: TokenSplit
    data_hash: str
    """SHA-256 of the rows, the format and the tokenizer: the key of the cache."""


def load_tasks(config: RunConfig, tokenizer: Any, cache: Path) -> dict[str, Task]:
    """All tasks that some adapter learns. Raises one UserError with the faults of all their sources, formats, splits and step
    sizes."""
    problems: list[Problem] = []
    tasks: dict[str, Task] = {}
    learnt = {name: task for name, task in config.tasks.items() if _learners(name, config)}
    for name, task in learnt.items():  # missing files are found before anything long is read
        for split, source in (("train", task.train), ("validation", task.validation)):
            try:
                if source is not None:
                    source_files(source, f"tasks.{name}.{split}")
            except UserError as error:
                problems += error.problems
    for name, task in learnt.items():
        if any(problem.key.startswith(f"tasks.{name}.") for problem in problems):
            continue
        try:
            tasks[name] = load_task(name, task, config, tokenizer, cache)
        except UserError as error:
            problems += error.problems
        else:
            step = (config.mixture.examples_per_draw, config.training.tokens_per_step)
            if problem := draw_problem(name, tasks[name].train.lengths, _learners(name, config), *step):
                problems.append(problem)
    if problems:
        raise UserError(*problems)
    return tasks


def _learners(task: str, config: RunConfig) -> int:
    return sum(task in (adapter.tasks or config.tasks) for adapter in config.adapters.values())


def draw_problem(task: str, lengths: NDArray[np.int64], adapters: int, examples: int, tokens_per_step: int) -> Problem | None:
    """One draw of a task, for each of its adapters, must fit into a step. examples: per draw; lengths: int [n], tokens."""
    longest = int(lengths.max())
    if (needed := longest * adapters * examples) <= tokens_per_step:
        return None
    fix = (
        f"cannot hold one draw of task {task!r}: {examples} example(s) of up to {longest} tokens for each of "
        f"{adapters} adapters; raise it to {needed}, or shorten training.max_length"
    )
    return Problem("training.tokens_per_step", tokens_per_step, fix)


def load_task(name: str, task: TaskConfig, config: RunConfig, tokenizer: Any, cache: Path) -> Task:
    """Read, split, format and tokenise one task, or take the result from `cache`."""
    key = f"tasks.{name}"
    train_rows = read_rows(task.train, f"{key}.train")
    format_row = make_formatter(task, train_rows, key)
    if task.validation is not None:
        held_rows = read_rows(task.validation, f"{key}.validation")
        format_row.check(held_rows, "validation")
    else:
        train_rows, held_rows = _split(train_rows, task.validation_fraction, seed_of(config.seed, name, "split"), key)
    max_length, over_long = config.training.max_length, task.over_long
    setting = [CACHE_VERSION, max_length, over_long, tokenizer_hash(tokenizer)]
    splits = {}
    digest = hashlib.sha256()
    for split, rows, limit in (("train", train_rows, task.max_examples), ("validation", held_rows, task.max_validation_examples)):
        chosen = _sample(rows, limit, seed_of(config.seed, name, split))
        examples, unsampled = [format_row(row) for row in chosen], len(rows) - len(chosen)
        packing = split == "train" and task.packing  # held-out examples stay apart: intervals resample them
        content = _hash([*setting, packing, unsampled], examples)
        digest.update(content.encode())
        make = partial(tokenise, examples, tokenizer, max_length, over_long, unsampled)
        if packing:
            make = partial(_packed, make, max_length)
        splits[split] = _cached(cache / f"{content[:32]}.npz", make)
        if not len(splits[split]):
            counts = splits[split].counts
            raise fail(
                f"{key}.{split}",
                None,
                f"no usable example among {counts.rows} rows: {counts.empty} empty, {counts.over_long_dropped} over-long, "
                f"{counts.prompt_too_long} with a prompt of training.max_length = {max_length} tokens or more",
            )
    return Task(name, task.weight, splits["train"], splits["validation"], digest.hexdigest())


def _packed(make: Callable[[], TokenSplit], max_length: int) -> TokenSplit:
    return pack(make(), max_length)


def seed_of(seed: int, *words: str) -> int:
    """A seed that depends on its words only: adding a task changes no other's."""
    return zlib.crc32("\x1f".join((str(seed), *words)).encode())


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 over the fast tokenizer's whole definition, or over the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256((content + str(tokenizer.eos_token_id)).encode()).hexdigest()


def _split(rows: list[Row], fraction: float, seed: int, key: str) -> tuple[list[Row], list[Row]]:
    if len(rows) < 2:
        raise fail(f"{key}.train", None, f"has {len(rows)} row: none can be held out; give a validation source or more rows")
    order = np.random.default_rng(seed).permutation(len(rows))
    held = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    return [rows[i] for i in sorted(order[held:])], [rows[i] for i in sorted(order[:held])]


def _sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:limit])]


def _hash(setting: list[Any], examples: list[TextExample]) -> str:
    digest = hashlib.sha256(json.dumps(setting).encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, example.completion]).encode())
    return digest.hexdigest()


def _cached(path: Path, make: Callable[[], TokenSplit]) -> TokenSplit:
    if path.exists():
        try:
            return TokenSplit.load(path)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
            path.unlink(missing_ok=True)  # a damaged cache file is made again
    split = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        split.save(path)
    except OSError as error:  # a cache that cannot be written costs time, not the run
        warnings.warn(f"tokens are not cached: {error}", stacklevel=2)
    return split
