"""What did somebody generate? Completions from a jsonl file, or from MultiPL-E's own folder of .json(.gz) files."""

from __future__ import annotations

import gzip
import json
import zlib
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
"""The adapter's name where a file names none."""
LARGEST_FILE = 1 << 30
"""Bytes that the completions of one problem may unpack to."""
LARGEST_SAMPLE = 2**53
"""What every JSON reader keeps whole."""


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
    """path: a jsonl file of {language, name, completion, sample?, adapter?}, whose problems stand in the folder `prompts`; or
    MultiPL-E's layout, a file or folder of .json or .json.gz with {language, name, prompt, tests, completions, stop_tokens}.
    Samples without a number count from 0. Raises UserError naming file and line; two samples with one key are an error."""
    if not path.exists():
        raise user_error("completions", str(path), "no such file or folder")
    found = list(_from_jsonl(path, prompts) if path.suffix == ".jsonl" else _from_multipl_e(path))
    if not found:
        raise user_error("completions", str(path), "holds no completion")
    seen: set[tuple[str, str, str, int]] = set()
    for completion in found:
        if completion.key in seen:
            raise user_error("completions", str(completion.key), "stands twice (adapter, language, name, sample)")
        seen.add(completion.key)
    return found


def write_multipl_e(completions: Iterable[Completion], folder: Path, options: EvaluationConfig) -> Path:
    """In MultiPL-E's layout: `folder`/humaneval-<language>-<adapter>-<temperature>-reworded/<name>.json.gz, all samples of a
    problem in one file. options: how they were drawn."""
    for file, row in _layout(completions, folder, options).items():
        write_atomically(file, partial(_write_bytes, gzip.compress(json.dumps(row).encode(), mtime=0)))
    return folder


def check_multipl_e(completions: Iterable[Completion], folder: Path, options: EvaluationConfig) -> None:
    """Raises UserError if `write_multipl_e` might overwrite a file whose completions are not among these, which it was written from."""
    ours = _layout(completions, folder, options)
    for file in sorted(folder.glob(f"humaneval-*-{options.temperature}-reworded/*.json.gz")):
        mine = ours.get(file, {}).get("completions", [])
        try:
            theirs = json.loads(gzip.decompress(file.read_bytes()))["completions"]
        except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError, zlib.error):
            theirs = None
        if not isinstance(theirs, list) or any(text not in mine for text in theirs):
            raise user_error(
                "multipl_e", str(file), "holds completions of another origin: choose another folder, or move it away"
            )


def _layout(completions: Iterable[Completion], folder: Path, options: EvaluationConfig) -> dict[Path, dict[str, Any]]:
    """File -> its content, in MultiPL-E's layout."""
    grouped: dict[tuple[str, Problem], dict[int, str]] = {}
    for completion in completions:
        grouped.setdefault((completion.adapter, completion.problem), {})[completion.sample] = completion.text
    drawn = {"temperature": options.temperature, "top_p": options.top_p, "max_tokens": options.max_new_tokens}
    files = {}
    for (adapter, problem), samples in grouped.items():
        place = folder / f"humaneval-{problem.language}-{adapter}-{options.temperature}-reworded"
        files[place / f"{problem.name}.json.gz"] = {
            **{"name": problem.name, "language": problem.language, "prompt": problem.prompt, "tests": problem.tests},
            **drawn,
            "completions": [samples[i] for i in sorted(samples)],
            "stop_tokens": problem.stop_tokens,
        }
    return files


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _from_jsonl(path: Path, prompts: Path | None) -> Iterator[Completion]:
    if prompts is None:
        raise user_error("prompts", None, "say where MultiPL-E's prompt files are: prompts=FOLDER")
    problems: dict[str, dict[str, Problem]] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):  # U+2028 may stand inside a line
        if not line.strip():
            continue
        at = f"{path}:{number}"
        row = _object(at, line, ("language", "name", "completion"))
        language, name = language_key(_text(at, row, "language")), _text(at, row, "name")
        adapter = _text(at, row, "adapter") if "adapter" in row else MODEL
        if language not in problems:
            problems[language] = load_problems(prompts, language)
        if name not in problems[language]:
            raise user_error(
                at, name, f"is no problem of {prompts}/humaneval-{language}.jsonl: these completions are for other prompts"
            )
        next_sample = counts.get((adapter, language, name), 0)
        counts[adapter, language, name] = next_sample + 1
        sample = row.get("sample", next_sample)
        if type(sample) is not int or not 0 <= sample <= LARGEST_SAMPLE:
            raise user_error(f"{at}: sample", sample, "must be a whole number, counted from 0")
        yield Completion(adapter, problems[language][name], sample, _text(at, row, "completion"))


def _from_multipl_e(path: Path) -> Iterator[Completion]:
    files = [path] if not path.is_dir() else sorted(p for p in path.iterdir() if p.name.endswith((".json", ".json.gz")))
    for file in files:
        if ".results." in file.name:
            continue
        text = _unpacked(file) if file.suffix == ".gz" else read_text(file)
        row = _object(str(file), text, ("language", "name", "prompt", "tests", "completions"))
        problem = problem_of(str(file), language_key(_text(str(file), row, "language")), row)
        completions = row["completions"]
        if not isinstance(completions, list):
            raise user_error(f"{file}: completions", completions, "must be a list of texts")
        for sample, completion in enumerate(completions):
            at = f"{file}: completions.{sample}"
            yield Completion(MODEL, problem, sample, _text(at, {"completion": completion}, "completion"))


def _text(at: str, row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise user_error(f"{at}: {field}", row[field], "must be text")
    return whole_characters(row[field])


def _unpacked(file: Path) -> str:
    if not file.is_file():
        raise user_error(str(file), None, "is no regular file")
    try:
        with gzip.open(file) as packed:
            content = packed.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise user_error(
                str(file), None, f"unpacks to more than {LARGEST_FILE >> 20} MiB: these are no completions of one problem"
            )
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise user_error(str(file), None, f"is no text in UTF-8 (byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise user_error(str(file), None, f"is no whole gzip file: {first_line(error)}") from error


def _object(at: str, text: str, fields: tuple[str, ...]) -> Mapping[str, Any]:
    row = parse_json_at(at, text)
    if missing := [field for field in fields if not isinstance(row, dict) or field not in row]:
        raise user_error(at, None, f"lacks {', '.join(missing)}")
    return row
