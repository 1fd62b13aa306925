"""Tokenizes the rows of a task of text in a stream, and keeps the tokens memory-mapped in the cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.cache import load_cached
from flora_train.data.documents import LocatedRow, RowEncoder
from flora_train.data.encoding import encode_chunks
from flora_train.data.encoding_worker import EncoderArguments
from flora_train.data.labels.resolve import with_labels
from flora_train.data.labels.survey import LabelSurvey
from flora_train.data.packing import pack
from flora_train.data.row_choice import ChosenRows, choose_rows
from flora_train.data.row_encoders import make_row_encoder
from flora_train.data.row_survey import Survey, row_digest, survey_rows
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.split_by import task_rows
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import tokenizer_hash
from flora_train.runtime.distributed import is_main_process
from flora_train.runtime.environment import available_cpus
from flora_train.runtime.progress import ProgressBar

CACHE_VERSION = 8
CHUNK_ROWS, CHUNK_BYTES = 1024, 1 << 23
"""Rows, and about how many bytes of them, that are encoded at once."""
MANY_ROWS = 10_000
"""Rows from which on one process tokenizes while the others wait, and the disk is checked."""
HEAD_START = 1.0
"""Seconds that other processes leave the main process, which shows the progress."""
WAITING = 30.0
"""Seconds between two lines of a process that waits for another one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSplits:
    """The tokens of a task."""

    splits: Mapping[str, TokenSplit]
    data_hash: str
    encoder: RowEncoder
    label_surveys: Mapping[str, LabelSurvey]
    """Source -> the labels of its rows; empty for other tasks than labelled texts."""


@dataclass(frozen=True)
class _Part:
    """A split of a task, and where its tokens are kept."""

    source: str
    """Split of the configuration whose rows it has."""
    rows: NDArray[np.int64]
    """Indexes of its rows, ascending."""
    unsampled: int
    content: str
    """SHA-256 of its rows, and of all that tokens depend on."""
    path: Path


def load_text_splits(
    name: str, task: TaskConfig, config: RunConfig, tokenizer: Any, cache: Path
) -> TextSplits:
    """Read, split and tokenize one task, or load the result from `cache`.

    The rows are read twice, one after the other: to choose and to identify them, and, unless their tokens are
    in the cache, to tokenize them. Raises UserError for rows, columns or a disk that cannot be used.
    """
    key = f"tasks.{name}"
    rows = {"train": task_rows(task, "train", key)}
    for split in ("validation", "test"):
        if getattr(task, split) is not None:
            rows[split] = task_rows(task, split, key)
    labels = {split: LabelSurvey(task, key) for split in rows if task.is_labelled}
    surveys = {
        split: survey_rows(_observed(rows[split], labels.get(split)), f"{name} ({split})", cache)
        for split in rows
    }
    if labels:
        task = with_labels(task, labels, key)
    outline = surveys["train"].outline
    max_length = config.training.max_length
    encoder = make_row_encoder(task, tokenizer, rows=outline, max_length=max_length, key=key)
    for split in surveys.keys() - {"train"}:
        encoder.check(surveys[split].outline, split)
    setting = [CACHE_VERSION, encoder.setting, tokenizer_hash(tokenizer)]
    strata = None
    if task.is_stratified:
        strata = {split: survey.strata for split, survey in labels.items()}
    sizes = {split: len(survey) for split, survey in surveys.items()}
    parts = {
        split: _part(setting, surveys[chosen.source], chosen, cache)
        for split, chosen in choose_rows(name, task, config, sizes, strata=strata).items()
    }
    arguments = EncoderArguments(task, tokenizer, outline, max_length, key)
    builder = _Builder(name, rows, surveys, encoder=encoder, arguments=arguments, parts=parts)
    splits = builder.load_or_build()
    digest = hashlib.sha256()
    for split, part in parts.items():
        # held-out examples are resampled by intervals, and never packed
        packing = split == "train" and task.packing
        digest.update(f"{part.content} {packing}".encode())
        _check_not_empty(splits[split], f"{key}.{split}", max_length)
        if packing:
            splits[split] = pack(splits[split], max_length)
    return TextSplits(splits, digest.hexdigest(), encoder, labels)


def _observed(rows: Iterable[LocatedRow], survey: LabelSurvey | None) -> Iterable[LocatedRow]:
    """The same rows, whose labels are collected while they are read."""
    return rows if survey is None else survey.observe(rows)


class _Builder:
    """Makes the splits of a task that are not in the cache."""

    def __init__(
        self,
        name: str,
        rows: Mapping[str, Iterable[LocatedRow]],
        surveys: Mapping[str, Survey],
        *,
        encoder: RowEncoder,
        arguments: EncoderArguments,
        parts: Mapping[str, _Part],
    ) -> None:
        self.name, self.rows, self.surveys = name, rows, surveys
        self.encoder, self.arguments, self.parts = encoder, arguments, parts

    def load_or_build(self) -> dict[str, TokenSplit]:
        """The splits, by name."""
        splits = self._load()
        if len(splits) == len(self.parts):
            return splits
        with _alone(self.parts["train"], self.name, large=self._total(self.parts) >= MANY_ROWS):
            splits = self._load()  # another process may have made them meanwhile
            missing = {split: part for split, part in self.parts.items() if split not in splits}
            for source in dict.fromkeys(part.source for part in missing.values()):
                of_source = {split: part for split, part in missing.items() if part.source == source}
                splits |= self._build(source, of_source)
        return splits

    def _load(self) -> dict[str, TokenSplit]:
        loaded = {split: load_cached(part.path, TokenSplit) for split, part in self.parts.items()}
        return {split: tokens for split, tokens in loaded.items() if tokens is not None}

    @staticmethod
    def _total(parts: Mapping[str, _Part]) -> int:
        return sum(len(part.rows) for part in parts.values())

    def _build(self, source: str, parts: Mapping[str, _Part]) -> dict[str, TokenSplit]:
        """Tokenize the rows of one source in their order, for all splits that have rows of it."""
        total, done = self._total(parts), 0
        names = list(parts)
        with ExitStack() as stack:
            progress = stack.enter_context(ProgressBar(f"tokenize {self.name} ({', '.join(names)})", total))
            builders = [stack.enter_context(SplitBuilder(part.path)) for part in parts.values()]
            if total >= MANY_ROWS:
                progress.update(0)
            chunks = self._chunks(source, list(parts.values()))
            encoded = encode_chunks(
                chunks, self.encoder, self.arguments, rows=total, processors=available_cpus()
            )
            stack.callback(encoded.close)
            for part, examples in encoded:
                for example in examples:
                    builders[part].add(example)
                done += len(examples)
                if total >= CHUNK_ROWS:
                    progress.update(done)
                if done < total and total >= MANY_ROWS:
                    self._check_disk(builders, parts, done / total)
            return {
                split: builder.split(unsampled=part.unsampled)
                for (split, part), builder in zip(parts.items(), builders, strict=True)
            }

    def _chunks(self, source: str, parts: Sequence[_Part]) -> Iterator[tuple[int, list[LocatedRow]]]:
        """(index of a part, some of its rows), until all rows of all parts are there."""
        survey = self.surveys[source]
        part_of = np.full(len(survey), -1, dtype=np.int8)
        for i, part in enumerate(parts):
            part_of[part.rows] = i
        chunks: list[list[LocatedRow]] = [[] for _ in parts]
        sizes = [0] * len(parts)
        count = 0
        for row in self.rows[source]:
            i = int(part_of[count]) if count < len(survey) else -1
            count += 1
            if i < 0:
                continue
            if row_digest(row) != survey.digests[count - 1].tobytes():
                self._report_change(source, row)
            size = _size(row)
            if chunks[i] and (len(chunks[i]) >= CHUNK_ROWS or sizes[i] + size > CHUNK_BYTES):
                yield i, chunks[i]
                chunks[i], sizes[i] = [], 0
            chunks[i].append(row)
            sizes[i] += size
        if count != len(survey):
            self._report_change(source, None)
        yield from ((i, chunk) for i, chunk in enumerate(chunks) if chunk)

    def _report_change(self, source: str, row: LocatedRow | None) -> None:
        where = None if row is None else row.where
        hint = "changed while it was read: run again when nothing writes it"
        raise user_error(f"tasks.{self.name}.{source}", where, hint)

    def _check_disk(self, builders: Sequence[SplitBuilder], parts: Mapping[str, _Part], share: float) -> None:
        """Raises UserError if the tokens of the rest will not fit on the disk."""
        written = sum(builder.bytes_so_far for builder in builders)
        folder = next(iter(parts.values())).path.parent
        try:
            free = shutil.disk_usage(folder).free
        except OSError:  # the folder cannot be made: the tokens are elsewhere
            return
        needed = written / share - written
        if needed > free:
            hint = (
                f"has room for {free / 1e9:.1f} GB, and the tokens of tasks.{self.name} need "
                f"{needed / 1e9:.1f} GB more: set XDG_CACHE_HOME to a folder with more room, or max_examples"
            )
            raise user_error(str(folder), None, hint)


def _part(setting: list[Any], survey: Survey, chosen: ChosenRows, cache: Path) -> _Part:
    unsampled = len(chosen.rows) - len(chosen.used)
    content = survey.content_hash([*setting, unsampled], chosen.used)
    return _Part(chosen.source, chosen.used, unsampled, content, cache / f"{content[:32]}.tokens")


def _size(row: LocatedRow) -> int:
    """About how many bytes a row has."""
    return sum(len(cell) for cell in row.cells.values() if isinstance(cell, str | bytes))


@contextmanager
def _alone(part: _Part, name: str, *, large: bool) -> Iterator[None]:
    """A context in which no other process makes the tokens of a large split."""
    if not large:
        yield
        return
    if not is_main_process():
        time.sleep(HEAD_START)
    folder = part.path.parent.parent / "locks"
    lock = FileLock(folder / f"{part.path.stem}.lock")
    # without a lock (a file system may have none), each process makes the tokens
    with suppress(OSError, NotImplementedError):
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=WAITING)
            except Timeout:
                logger.info(f"tokens of {name}: another process makes them")
    try:
        yield
    finally:
        lock.release()


def _check_not_empty(split: TokenSplit, key: str, max_length: int) -> None:
    """Raises UserError with the counts if a split has no example."""
    if len(split):
        return
    counts = split.counts
    hint = (
        f"no usable example among {counts.rows} rows: {counts.empty} empty, "
        f"{counts.over_long_dropped} over-long, "
        f"{counts.prompt_too_long} with a prompt of training.max_length = {max_length} tokens or more"
    )
    raise user_error(key, None, hint)
