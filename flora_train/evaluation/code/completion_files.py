"""Completions from other sources: a jsonl file, or MultiPL-E's folder of .json(.gz) files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flora_train.config.errors import first_line, user_error
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.config.json_format import parse_json_at
from flora_train.config.language_names import language_key
from flora_train.evaluation.code.problems.problem import (
    Problem,
    load_problems,
    problem_of,
    read_text,
    whole_characters,
)
from flora_train.runtime.atomic import write_atomically

MODEL = "model"
"""The adapter's name if a file has none."""
LARGEST_FILE = 1 << 30
"""Bytes that the completions of one problem may unpack to."""
LARGEST_SAMPLE = 2**53
"""The largest integer that all JSON readers preserve."""
JSONL_FIELDS = ("language", "name", "completion")
MULTIPL_E_FIELDS = ("language", "name", "prompt", "tests", "completions")


@dataclass(frozen=True)
class Completion:
    """One sample of one adapter for one problem."""

    adapter: str
    problem: Problem
    sample: int
    text: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.adapter, self.problem.language, self.problem.name, self.sample


def read_completions(path: Path, prompts: Path | None) -> list[Completion]:
    """Read a jsonl file, or MultiPL-E's layout.

    Raises UserError naming file and line, also for repeated samples.

    A jsonl file has rows of {language, name, completion, sample?, adapter?}, for problems in the folder
    `prompts`. MultiPL-E's layout is a file or folder of .json or .json.gz with {language, name, prompt,
    tests, completions, stop_tokens}. Samples without a number are counted from 0.
    """
    if not path.exists():
        raise user_error("completions", str(path), "no such file or folder")
    rows = _from_jsonl(path, prompts) if path.suffix == ".jsonl" else _from_multipl_e(path)
    completions = list(rows)
    if not completions:
        raise user_error("completions", str(path), "has no completions")
    keys: set[tuple[str, str, str, int]] = set()
    for completion in completions:
        if completion.key in keys:
            hint = "occurs twice (adapter, language, name, sample)"
            raise user_error("completions", str(completion.key), hint)
        keys.add(completion.key)
    return completions


def write_multipl_e(completions: Iterable[Completion], folder: Path, options: EvaluationConfig) -> Path:
    """Write MultiPL-E's layout, with all samples of a problem in one file.

    Files are `folder`/humaneval-<language>-<adapter>-<temperature>-reworded/<name>.json.gz. options: the
    settings that the completions were sampled with.
    """
    for file, row in _layout(completions, folder, options).items():
        write_atomically(file, partial(_write_bytes, gzip.compress(json.dumps(row).encode(), mtime=0)))
    return folder


def check_multipl_e(completions: Iterable[Completion], folder: Path, options: EvaluationConfig) -> None:
    """Raises UserError if `write_multipl_e` could overwrite a file with other completions."""
    layout = _layout(completions, folder, options)
    for file in sorted(folder.glob(f"humaneval-*-{options.temperature}-reworded/*.json.gz")):
        known = layout.get(file, {}).get("completions", [])
        try:
            existing = json.loads(gzip.decompress(file.read_bytes()))["completions"]
        except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError, zlib.error):
            existing = None
        if not isinstance(existing, list) or any(text not in known for text in existing):
            hint = "has completions of another origin: choose another folder, or move it away"
            raise user_error("multipl_e", str(file), hint)


def _layout(
    completions: Iterable[Completion], folder: Path, options: EvaluationConfig
) -> dict[Path, dict[str, Any]]:
    """File -> its content, in MultiPL-E's layout."""
    grouped: dict[tuple[str, Problem], dict[int, str]] = {}
    for completion in completions:
        grouped.setdefault((completion.adapter, completion.problem), {})[completion.sample] = completion.text
    files = {}
    for (adapter, problem), samples in grouped.items():
        subfolder = folder / f"humaneval-{problem.language}-{adapter}-{options.temperature}-reworded"
        files[subfolder / f"{problem.name}.json.gz"] = {
            "name": problem.name,
            "language": problem.language,
            "prompt": problem.prompt,
            "tests": problem.tests,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
            "completions": [samples[i] for i in sorted(samples)],
            "stop_tokens": problem.stop_tokens,
        }
    return files


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _from_jsonl(path: Path, prompts: Path | None) -> Iterator[Completion]:
    if prompts is None:
        raise user_error(
            "prompts", None, "is required: the folder of MultiPL-E's prompt files, --prompts FOLDER"
        )
    problems: dict[str, dict[str, Problem]] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    for number, line in enumerate(
        read_text(path).split("\n"), 1
    ):  # not splitlines: U+2028 may occur in a line
        if not line.strip():
            continue
        location = f"{path}:{number}"
        row = _mapping(location, line, JSONL_FIELDS)
        language, name = language_key(_text(location, row, "language")), _text(location, row, "name")
        adapter = _text(location, row, "adapter") if "adapter" in row else MODEL
        if language not in problems:
            problems[language] = load_problems(prompts, language)
        if name not in problems[language]:
            file = f"{prompts}/humaneval-{language}.jsonl"
            raise user_error(
                location, name, f"is not a problem of {file}: these completions are for other prompts"
            )
        sample = row.get("sample", counts[adapter, language, name])
        counts[adapter, language, name] += 1
        if type(sample) is not int or not 0 <= sample <= LARGEST_SAMPLE:
            raise user_error(f"{location}: sample", sample, "must be a whole number, counted from 0")
        yield Completion(adapter, problems[language][name], sample, _text(location, row, "completion"))


def _from_multipl_e(path: Path) -> Iterator[Completion]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.endswith((".json", ".json.gz")))
    for file in files:
        if ".results." in file.name:
            continue
        content = _unpacked(file) if file.suffix == ".gz" else read_text(file)
        row = _mapping(str(file), content, MULTIPL_E_FIELDS)
        problem = problem_of(str(file), language_key(_text(str(file), row, "language")), row)
        completions = row["completions"]
        if not isinstance(completions, list):
            raise user_error(f"{file}: completions", completions, "must be a list of texts")
        for sample, completion in enumerate(completions):
            text = _text(f"{file}: completions.{sample}", {"completion": completion}, "completion")
            yield Completion(MODEL, problem, sample, text)


def _text(location: str, row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise user_error(f"{location}: {field}", row[field], "must be text")
    return whole_characters(row[field])


def _unpacked(file: Path) -> str:
    if not file.is_file():
        raise user_error(str(file), None, "is not a regular file")
    try:
        with gzip.open(file) as packed:
            content = packed.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            hint = f"unpacks to more than {LARGEST_FILE >> 20} MiB, too much for completions of one problem"
            raise user_error(str(file), None, hint)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise user_error(str(file), None, f"is not text in UTF-8 (byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise user_error(str(file), None, f"is not a complete gzip file: {first_line(error)}") from error


def _mapping(location: str, text: str, fields: tuple[str, ...]) -> Mapping[str, Any]:
    row = parse_json_at(location, text)
    if not isinstance(row, dict):
        row = {}
    if missing := [field for field in fields if field not in row]:
        raise user_error(location, None, f"lacks {', '.join(missing)}")
    return row
