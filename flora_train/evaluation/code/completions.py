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

from flora_train.atomic import write_atomically
from flora_train.config.errors import fail
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.data.strict_json import read_json
from flora_train.evaluation.code.problems.problem import Problem, load_problems, stop_tokens

MODEL = "model"
"""The adapter's name where a file names none."""


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
        raise fail("completions", str(path), "no such file or folder")
    found = list(_from_jsonl(path, prompts) if path.suffix == ".jsonl" else _from_multipl_e(path))
    if not found:
        raise fail("completions", str(path), "holds no completion")
    seen: set[tuple[str, str, str, int]] = set()
    for completion in found:
        if completion.key in seen:
            raise fail("completions", str(completion.key), "stands twice (adapter, language, name, sample)")
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
            raise fail("multipl_e", str(file), "holds completions of another origin: choose another folder, or move it away")


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
        raise fail("prompts", None, "say where MultiPL-E's prompt files are: prompts=FOLDER")
    problems: dict[str, dict[str, Problem]] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):  # U+2028 may stand inside a line
        if not line.strip():
            continue
        at = f"{path}:{number}"
        row = _object(at, line, ("language", "name", "completion"))
        language, name, adapter = str(row["language"]), str(row["name"]), str(row.get("adapter", MODEL))
        if language not in problems:
            problems[language] = load_problems(prompts, language)
        if name not in problems[language]:
            raise fail(
                at, name, f"is no problem of {prompts}/humaneval-{language}.jsonl: these completions are for other prompts"
            )
        next_sample = counts.get((adapter, language, name), 0)
        counts[adapter, language, name] = next_sample + 1
        yield Completion(adapter, problems[language][name], int(row.get("sample", next_sample)), _text(row["completion"]))


def _from_multipl_e(path: Path) -> Iterator[Completion]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.name.endswith((".json", ".json.gz")))
    for file in files:
        if ".results." in file.name:
            continue
        text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text(encoding="utf-8")
        row = _object(str(file), text, ("language", "name", "prompt", "tests", "completions"))
        stops = stop_tokens(row.get("stop_tokens", ()), str(file))
        if not isinstance(row["completions"], list):
            raise fail(str(file), row["completions"], "completions must be a list of texts")
        language = _key(str(row["language"]))
        problem = Problem(language, str(row["name"]), str(row["prompt"]), str(row["tests"]), stops)
        for sample, text in enumerate(row["completions"]):
            yield Completion(MODEL, problem, sample, _text(text))


def _text(value: Any) -> str:
    """JSON can spell half a character, which no file takes."""
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _key(language: str) -> str:
    """MultiPL-E's word for a language inside its files -> the key of its prompt set."""
    others = {"go_test.go": "go", "adb": "ada", "humaneval_to_dlang.py": "d", "python": "py", "racket": "rkt", "rust": "rs"}
    return others.get(language, language)


def _object(at: str, text: str, fields: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        row = read_json(text)
    except ValueError as error:
        raise fail(at, None, str(error)) from error
    if missing := [field for field in fields if not isinstance(row, dict) or field not in row]:
        raise fail(at, None, f"lacks {', '.join(missing)}")
    return row
