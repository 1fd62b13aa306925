"""Loads the splits of a speech task: usable clips with tokenised transcripts, and counts of the others."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.audio.common_voice import FAULT
from flora_train.data.audio.decode import MISSING
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.audio.speech_split import SpeechSplit, Utterance, speech_split
from flora_train.data.cache import cached
from flora_train.data.file_rows import Row
from flora_train.data.sources import source_files
from flora_train.data.split_by import task_rows
from flora_train.data.splits import hold_out, sample, seed_of_rows
from flora_train.data.templates import cell_text
from flora_train.data.token_split import SplitCounts
from flora_train.data.tokenization import tokenizer_hash
from flora_train.runtime.atomic import write_atomically

CACHE_VERSION = 3
NO_SENTENCE, TOO_LONG, REPEATED, HELD_OUT, TOO_MANY_TOKENS = (
    "no transcript",
    "longer than audio.max_seconds",
    "listed twice",
    "also in a held-out split",
    "transcript longer than training.max_length",
)

ABSENT = (-1, -1)
"""The stamp of a clip that does not exist."""


@dataclass(frozen=True)
class Line:
    """A row of the source."""

    path: str
    sentence: str
    speaker: str
    stamp: tuple[int, int]
    """Size and modification time of the clip's file; ABSENT if it does not exist."""
    seconds: float | None
    """Length of the clip, if the source states it."""
    fault: str | None = None
    """Reason why the row cannot be used, if the source states one."""


@dataclass(frozen=True)
class SpeechTask:
    """The splits of a speech task."""

    train: SpeechSplit
    validation: SpeechSplit
    test: SpeechSplit | None
    data_hash: str
    """SHA-256 of everything that the splits depend on."""
    origin: str
    """Name of the release that the clips are from, if there is one."""


def load_speech_task(
    name: str, task: TaskConfig, config: RunConfig, *, speech_processor: SpeechProcessor, cache: Path
) -> SpeechTask:
    """Load all splits.

    Raises UserError for a missing column, an unknown language, or a split without a usable clip.
    """
    assert task.speech is not None
    key = f"tasks.{name}"
    prompt = speech_processor.prompt(task.speech, key)
    lines: dict[str, list[Line]] = {}
    sources = {"train": task.train, "validation": task.validation, "test": task.test}
    origins: list[str] = []
    for split, source in sources.items():
        if source is not None:
            rows = [row.cells for row in task_rows(task, split, key)]
            origins += [str(row["release"]) for row in rows[:1] if "release" in row]
            lines[split] = _lines(rows, source, task, key=f"{key}.{split}", cache=cache)
    if "validation" not in lines:
        group = _speaker if task.speech.speaker else _normalised_sentence
        seed = seed_of_rows(config, name, "split")
        lines["train"], lines["validation"] = hold_out(
            lines["train"], task.validation_fraction, seed, key=key, group_of=group
        )
    limits = {
        "train": task.max_examples,
        "validation": task.max_validation_examples,
        "test": task.max_test_examples,
    }
    build = _SplitBuilder(name, config, speech_processor, prompt=prompt, cache=cache)
    splits: dict[str, SpeechSplit] = {}
    excluded: list[Line] = []
    for split in ("test", "validation", "train"):
        if split in lines:
            splits[split] = build(split, lines[split], excluded=excluded, limit=limits[split])
            excluded += lines[split]
    digest = hashlib.sha256("".join(build.hashes).encode()).hexdigest()
    origin = " and ".join(dict.fromkeys(origins))
    return SpeechTask(splits["train"], splits["validation"], splits.get("test"), digest, origin)


class _SplitBuilder:
    """Builds a task's splits, or reads them from the cache."""

    def __init__(
        self,
        name: str,
        config: RunConfig,
        speech_processor: SpeechProcessor,
        *,
        prompt: list[int],
        cache: Path,
    ) -> None:
        self.name, self.config, self.prompt, self.cache = name, config, prompt, cache
        self.speech_processor = speech_processor
        self.special_tokens = config.tasks[name].special_tokens
        self.hashes: list[str] = []

    def __call__(
        self, split: str, lines: Sequence[Line], *, excluded: Sequence[Line], limit: int | None
    ) -> SpeechSplit:
        """excluded: lines of the other splits; their clips and sentences are left out of this one."""
        usable, unusable = self._usable(lines, excluded)
        chosen = sample(usable, limit, seed_of_rows(self.config, self.name, split))
        content = [[line.path, line.sentence, line.stamp] for line in chosen]
        settings = [*self._settings(), len(lines), unusable]
        key = hashlib.sha256(json.dumps([settings, content]).encode()).hexdigest()
        self.hashes.append(key)
        unsampled = len(usable) - len(chosen)
        build = partial(
            self._check_and_tokenise, split, chosen, unusable, unsampled=unsampled, rows=len(lines)
        )
        built = cached(self.cache / f"{key[:32]}.tokens", SpeechSplit, build)
        if not len(built):
            reasons = ", ".join(f"{len(paths)} {reason}" for reason, paths in built.counts.unusable.items())
            first = next(chain.from_iterable(built.counts.unusable.values()), "")
            hint = f"no usable clip among {len(lines)}: {reasons} (the first: {first})"
            raise user_error(f"tasks.{self.name}.{split}", None, hint)
        return built

    def _settings(self) -> list[Any]:
        """Everything but the rows that a split depends on."""
        audio, windows = self.speech_processor.audio, self.speech_processor.windows
        return [
            CACHE_VERSION,
            self.config.training.max_length,
            audio.max_seconds,
            windows.step,
            windows.longest,
            windows.positions(windows.longest),
            self.prompt,
            tokenizer_hash(self.speech_processor.tokenizer),
            self.special_tokens,
        ]

    def _usable(
        self, lines: Sequence[Line], excluded: Sequence[Line]
    ) -> tuple[list[Line], dict[str, list[str]]]:
        """Lines that may be sampled, and the paths of the others by reason, before any decoding."""
        excluded = [line for line in excluded if line.fault is None]
        excluded_paths = {line.path for line in excluded}
        excluded_sentences = {_normalised_sentence(line) for line in excluded}
        usable: dict[str, Line] = {}
        unusable: dict[str, list[str]] = defaultdict(list)
        for line in lines:
            if line.fault is not None:
                unusable[line.fault].append(line.path)
            elif not line.sentence.strip():
                unusable[NO_SENTENCE].append(line.path)
            elif line.path in usable:
                unusable[REPEATED].append(line.path)
            elif line.path in excluded_paths or _normalised_sentence(line) in excluded_sentences:
                unusable[HELD_OUT].append(line.path)
            elif line.seconds is not None and line.seconds > self.speech_processor.max_seconds:
                unusable[TOO_LONG].append(line.path)
            elif line.stamp == ABSENT:
                unusable[MISSING].append(line.path)
            else:
                usable[line.path] = line
        return list(usable.values()), dict(unusable)

    def _check_and_tokenise(
        self,
        split: str,
        lines: Sequence[Line],
        unusable: Mapping[str, list[str]],
        *,
        unsampled: int,
        rows: int,
    ) -> SpeechSplit:
        """Decode every clip once and tokenize its sentence."""
        paths_by_reason = defaultdict(list, {reason: list(paths) for reason, paths in unusable.items()})
        utterances, special_tokens = [], Counter[str]()
        max_tokens = min(self.config.training.max_length, self.speech_processor.max_tokens)
        clips = self.speech_processor.check_clips([line.path for line in lines], f"{self.name} ({split})")
        for line, clip in zip(lines, clips, strict=True):
            tokens, written = self.speech_processor.transcript(
                self.prompt, line.sentence, self.special_tokens
            )
            special_tokens += written
            if clip.fault is not None:
                paths_by_reason[clip.fault].append(line.path)
            elif clip.seconds > self.speech_processor.max_seconds:
                paths_by_reason[TOO_LONG].append(line.path)
            elif len(tokens) > max_tokens:
                paths_by_reason[TOO_MANY_TOKENS].append(line.path)
            else:
                samples = self.speech_processor.windows.samples(clip.seconds)
                positions = self.speech_processor.windows.positions(samples)
                utterance = Utterance(
                    line.path, clip.sha, clip.seconds, line.sentence, samples, positions, tokens
                )
                utterances.append(utterance)
        num_tokens = sum(len(u.tokens) for u in utterances)
        counts = SplitCounts(
            rows=rows,
            unsampled=unsampled,
            documents=len(utterances),
            examples=len(utterances),
            tokens=num_tokens,
            label_tokens=num_tokens - len(self.prompt) * len(utterances),
            unusable=dict(paths_by_reason),
            seconds=float(sum(u.seconds for u in utterances)),
            special_tokens=dict(special_tokens),
        )
        return speech_split(utterances, len(self.prompt), counts)


def _lines(
    rows: Sequence[Row], source: SourceConfig, task: TaskConfig, *, key: str, cache: Path
) -> list[Line]:
    """Rows with the absolute paths of their clips.

    Clips given as bytes are written to files named by their hash.
    """
    speech = task.speech
    assert speech is not None
    audio = "path" if source.common_voice is not None else speech.audio
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    for name, column in (("audio", audio), ("sentence", speech.sentence), ("speaker", speech.speaker)):
        if column is not None and column not in columns:
            hint = f"is not a column of {key}; it has {choices(columns)}.{did_you_mean(column, columns)}"
            raise user_error(f"{key.rpartition('.')[0]}.speech.{name}", column, hint)
    manifests = source_files(source, key)
    base = manifests[0].parent if manifests and source.common_voice is None else Path()
    is_remote = source.hub is not None and not Path(source.hub).is_dir()
    lines = []
    for row in rows:
        sentence, speaker = (_text(row, column, key) for column in (speech.sentence, speech.speaker))
        try:
            if is_remote:
                _check_embedded(row.get(audio))
            path = _clip_file(row.get(audio), base, cache)
        except ValueError as error:
            raise user_error(key, None, f"column {audio!r} {error}") from None
        seconds = row.get("seconds")
        if not isinstance(seconds, float):
            seconds = None
        fault = row.get(FAULT) if source.common_voice is not None else None
        lines.append(Line(path, " ".join(sentence.split()), speaker, _stamp(path), seconds, fault))
    return lines


def _text(row: Row, column: str | None, key: str) -> str:
    if column is None:
        return ""
    try:
        return cell_text(row.get(column))
    except ValueError as error:
        raise user_error(key, None, f"column {column!r} {error}") from None


def _check_embedded(value: Any) -> None:
    """Raises ValueError for a clip that a data set of the hub names instead of holding it: the path would be
    that of a file on this machine."""
    path = value
    if isinstance(value, Mapping):
        path = value.get("path")
        if value.get("bytes") is not None:
            return
    if path:
        raise ValueError(
            f"has the path {str(path)[:80]!r} instead of a clip: data sets on the hub must hold the bytes; "
            "download this one, and give its manifest under files"
        )


def _clip_file(value: Any, base: Path, cache: Path) -> str:
    """The file of a cell: a path, or a mapping of bytes and path as in parquet files.

    A path is relative to its manifest, the working directory or the project. Raises ValueError for other
    values.
    """
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if content is None:
            return _clip_file(str(value.get("path") or ""), base, cache)
        if not isinstance(content, bytes):
            raise ValueError(
                f"has a {type(content).__name__} under bytes: they must be bytes, as in parquet files"
            )
        file = cache.parent / "clips" / hashlib.sha256(content).hexdigest()[:40]
        if not file.exists():
            write_atomically(file, lambda path: path.write_bytes(content))
        return str(file)
    text = cell_text(value)
    try:
        path = Path(text).expanduser()
        beside_manifest = base / path
        if beside_manifest.exists():
            return str(beside_manifest.absolute())
        return str(find_file(str(path)).absolute())
    except (OSError, ValueError, RuntimeError):  # not a possible file name: counted as a missing file
        return str(Path(text.replace("\0", "")).absolute())


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ABSENT
    return status.st_size, status.st_mtime_ns


def _speaker(line: Line) -> str:
    return line.speaker


def _normalised_sentence(line: Line) -> str:
    """Sentences that are equal in this form count as the same."""
    return "".join(line.sentence.casefold().split())
