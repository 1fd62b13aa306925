"""How do rows of clips and transcripts become a task? Read, looked at, kept apart between splits, tokenised; nothing dropped silently."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.audio.speech_split import SpeechSplit, Utterance, speech_split
from flora_train.data.cache import cached
from flora_train.data.sources import Row, read_rows, source_files
from flora_train.data.splits import hold_out, sample, seed_of_rows
from flora_train.data.templates import cell_text
from flora_train.data.tokenization import SplitCounts, tokenizer_hash
from flora_train.runtime.atomic import write_atomically

CACHE_VERSION = 3
NO_SENTENCE, OVER_LONG, TWICE, HELD_OUT, TOO_MANY_TOKENS = (
    "no transcript",
    "longer than audio.max_seconds",
    "listed twice",
    "also in a held-out split",
    "transcript longer than training.max_length",
)


@dataclass(frozen=True)
class Line:
    """A row as it stands in its source. stamp: what changes when the file does."""

    path: str
    sentence: str
    speaker: str
    stamp: tuple[int, int]
    seconds: float | None


@dataclass(frozen=True)
class SpeechTask:
    """The splits of a speech task; `test` may be the same as `validation`. origin: a release's name, where there is one."""

    train: SpeechSplit
    validation: SpeechSplit
    test: SpeechSplit | None
    data_hash: str
    origin: str


def load_speech_task(
    name: str, task: TaskConfig, config: RunConfig, speech_processor: SpeechProcessor, cache: Path
) -> SpeechTask:
    """Raises UserError if a column is missing, a language unknown, or a split has no usable clip."""
    assert task.speech is not None
    key = f"tasks.{name}"
    prompt = speech_processor.prompt(task.speech, key)
    lines: dict[str, list[Line]] = {}
    rows_of = {"train": task.train, "validation": task.validation, "test": task.test}
    origins: list[str] = []
    for split, source in rows_of.items():
        if source is not None:
            rows = read_rows(source, f"{key}.{split}")
            origins += [str(row["release"]) for row in rows[:1] if "release" in row]
            lines[split] = _lines(rows, source, task, f"{key}.{split}", cache)
    if "validation" not in lines:
        group = (lambda line: line.speaker) if task.speech.speaker else (lambda line: _same(line.sentence))
        seed = seed_of_rows(config, name, "split")
        lines["train"], lines["validation"] = hold_out(lines["train"], task.validation_fraction, seed, key, group)
    limits = {"train": task.max_examples, "validation": task.max_validation_examples, "test": task.max_test_examples}
    make = _SplitMaker(name, config, speech_processor, prompt, cache)
    made: dict[str, SpeechSplit] = {}
    apart: list[Line] = []
    for split in ("test", "validation", "train"):
        if split in lines:
            made[split] = make(split, lines[split], apart, limits[split])
            apart += lines[split]
    digest = hashlib.sha256("".join(make.hashes).encode()).hexdigest()
    return SpeechTask(made["train"], made["validation"], made.get("test"), digest, " and ".join(dict.fromkeys(origins)))


class _SplitMaker:
    def __init__(self, name: str, config: RunConfig, speech_processor: SpeechProcessor, prompt: list[int], cache: Path) -> None:
        self.name, self.config, self.speech_processor, self.prompt, self.cache = name, config, speech_processor, prompt, cache
        self.special_tokens = config.tasks[name].special_tokens
        self.hashes: list[str] = []

    def __call__(self, split: str, lines: Sequence[Line], apart: Sequence[Line], limit: int | None) -> SpeechSplit:
        """apart: what other splits hold; no clip or sentence of theirs is in this one."""
        left_out: dict[str, list[str]] = defaultdict(list)
        paths, sentences = {line.path for line in apart}, {_same(line.sentence) for line in apart}
        usable: dict[str, Line] = {}
        for line in lines:
            if not line.sentence.strip():
                left_out[NO_SENTENCE].append(line.path)
            elif line.path in usable:
                left_out[TWICE].append(line.path)
            elif line.path in paths or _same(line.sentence) in sentences:
                left_out[HELD_OUT].append(line.path)
            elif line.seconds is not None and line.seconds > self.speech_processor.max_seconds:
                left_out[OVER_LONG].append(line.path)
            else:
                usable[line.path] = line
        chosen = sample(list(usable.values()), limit, seed_of_rows(self.config, self.name, split))
        audio = self.speech_processor.audio
        setting: list[Any] = [
            CACHE_VERSION,
            self.config.training.max_length,
            audio.max_seconds,
            self.speech_processor.windows.step,
        ]
        longest = self.speech_processor.windows.longest
        setting += [
            longest,
            self.speech_processor.windows.positions(longest),
            self.prompt,
            tokenizer_hash(self.speech_processor.tokenizer),
            self.special_tokens,
            len(lines),
            dict(left_out),
        ]
        content = [[line.path, line.sentence, line.stamp] for line in chosen]
        key = hashlib.sha256(json.dumps([setting, content]).encode()).hexdigest()
        self.hashes.append(key)
        make = partial(self._look, split, chosen, left_out, len(usable) - len(chosen), len(lines))
        found = cached(self.cache / f"{key[:32]}.npz", SpeechSplit, make)
        if not len(found):
            reasons = ", ".join(f"{len(paths)} {reason}" for reason, paths in found.counts.unusable.items())
            first = next((path for paths in found.counts.unusable.values() for path in paths), "")
            raise user_error(
                f"tasks.{self.name}.{split}", None, f"no usable clip among {len(lines)}: {reasons} (the first: {first})"
            )
        return found

    def _look(
        self, split: str, chosen: Sequence[Line], left_out: Mapping[str, list[str]], unsampled: int, rows: int
    ) -> SpeechSplit:
        unusable = defaultdict(list, {reason: list(paths) for reason, paths in left_out.items()})
        utterances, written = [], Counter[str]()
        room = min(self.config.training.max_length, self.speech_processor.max_tokens)
        clips = self.speech_processor.look([line.path for line in chosen], f"{self.name} ({split})")
        for line, clip in zip(chosen, clips, strict=True):
            tokens, special = self.speech_processor.transcript(self.prompt, line.sentence, self.special_tokens)
            written += special
            if clip.fault is not None:
                unusable[clip.fault].append(line.path)
            elif clip.seconds > self.speech_processor.max_seconds:
                unusable[OVER_LONG].append(line.path)
            elif len(tokens) > room:
                unusable[TOO_MANY_TOKENS].append(line.path)
            else:
                samples = self.speech_processor.windows.samples(clip.seconds)
                positions = self.speech_processor.windows.positions(samples)
                utterances.append(Utterance(line.path, clip.sha, clip.seconds, line.sentence, samples, positions, tokens))
        tokens_made = sum(len(u.tokens) for u in utterances)
        counts = SplitCounts(
            rows=rows,
            unsampled=unsampled,
            pieces=len(utterances),
            examples=len(utterances),
            tokens=tokens_made,
            label_tokens=tokens_made - len(self.prompt) * len(utterances),
            unusable=dict(unusable),
            seconds=float(sum(u.seconds for u in utterances)),
            special_tokens=dict(written),
        )
        return speech_split(utterances, len(self.prompt), counts)


def _lines(rows: Sequence[Row], source: SourceConfig, task: TaskConfig, key: str, cache: Path) -> list[Line]:
    """Rows with their clips as absolute paths; bytes are put into files, named by what they hold."""
    speech = task.speech
    assert speech is not None
    audio = "path" if source.common_voice is not None else speech.audio
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for name, column in (("audio", audio), ("sentence", speech.sentence), ("speaker", speech.speaker)):
        if column is not None and column not in columns:
            words = f"is no column of {key}; there are {choices(columns)}.{did_you_mean(column, columns)}"
            raise user_error(f"{key.rpartition('.')[0]}.speech.{name}", column, words)
    manifests = source_files(source, key)
    base = manifests[0].parent if manifests and source.common_voice is None else Path()
    found = []
    for row in rows:
        sentence, speaker = (_text(row, column, key) for column in (speech.sentence, speech.speaker))
        try:
            path = _clip_file(row.get(audio), base, cache)
        except ValueError as error:
            raise user_error(key, None, f"column {audio!r} {error}") from None
        seconds = row.get("seconds") if isinstance(row.get("seconds"), float) else None
        found.append(Line(path, " ".join(sentence.split()), speaker, _stamp(path), seconds))
    return found


def _text(row: Row, column: str | None, key: str) -> str:
    try:
        return cell_text(row.get(column)) if column is not None else ""
    except ValueError as error:
        raise user_error(key, None, f"column {column!r} {error}") from None


def _clip_file(value: Any, base: Path, cache: Path) -> str:
    """The file of a cell: a path, beside its manifest, in the working directory or the project; or {bytes, path}. Raises ValueError
    for what is neither."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if content is None:
            return _clip_file(str(value.get("path") or ""), base, cache)
        if not isinstance(content, bytes):
            raise ValueError(f"holds a {type(content).__name__} under bytes: they must be bytes, as in parquet files")
        file = cache.parent / "clips" / hashlib.sha256(content).hexdigest()[:40]
        if not file.exists():
            write_atomically(file, lambda path: path.write_bytes(content))
        return str(file)
    text = cell_text(value)
    try:
        path = Path(text).expanduser()
        beside = base / path
        return str((beside if beside.exists() else find_file(str(path))).absolute())
    except (OSError, ValueError, RuntimeError):  # no such name can be: it is left out as a missing file
        return str(Path(text.replace("\0", "")).absolute())


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _same(sentence: str) -> str:
    """Two transcripts that this makes equal are one sentence."""
    return "".join(sentence.casefold().split())
