"""Reads the completions and verdicts that `flora-train solve --out` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_train.config.errors import UserError
from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.problems.starter import load_starter_problems

from .pairs import PairError, Sample

BASE = "base"


@dataclass(frozen=True)
class Samples:
    """The programs of a suite."""

    samples: list[Sample]
    settings: dict[str, Any]
    """What they were sampled with."""


def read_samples(folder: Path, table: Path) -> Samples:
    """The programs of all adapters (not of the base) for the problems of `table`, in its order.

    Raises PairError if something is missing, or belongs to other problems."""
    verdicts = {_key(row): row for row in _rows(folder / "verdicts.jsonl")}
    problems: dict[str, Mapping[str, Problem]] = {}
    samples = []
    for file in sorted(folder.glob("completions-*.jsonl")):
        for row in _rows(file):
            if row["adapter"] == BASE:
                continue
            language = row["language"]
            if language not in problems:
                problems[language] = _problems(language, table)
            problem = problems[language].get(row["name"])
            verdict = verdicts.get(_key(row))
            if problem is None or problem.sha != row["prompt_sha"]:
                raise PairError(f"{file}: {row['name']} is not the problem of {table}: sample again")
            if verdict is None:
                raise PairError(f"{folder}: {row['name']} has no verdict: run flora-train solve to its end")
            samples.append(_sample(row, verdict, problem))
    if not samples:
        raise PairError(f"{folder}: no completions; run flora-train solve RUN --out {folder.parent}")
    order = {name: number for number, name in enumerate(next(iter(problems.values())))}
    samples.sort(key=lambda sample: (sample.language, order[sample.name], sample.sample, sample.adapter))
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    return Samples(samples, settings)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return row["adapter"], row["language"], row["name"], row["sample"]


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise PairError(f"{file}: no such file; run flora-train solve to its end")
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line:
            yield json.loads(line)


def _problems(language: str, table: Path) -> Mapping[str, Problem]:
    try:
        return load_starter_problems(language, table)
    except UserError as error:
        raise PairError(str(error)) from error


def _sample(row: Mapping[str, Any], verdict: Mapping[str, Any], problem: Problem) -> Sample:
    completion = problem.cut(row["completion"]).rstrip()
    return Sample(
        language=row["language"],
        name=row["name"],
        prompt=problem.prompt.rstrip(),
        completion=completion,
        adapter=row["adapter"],
        sample=row["sample"],
        status=verdict["status"],
        passed=verdict["status"] == "OK" and not verdict.get("suspicious", False),
        whole=row["ended"] != "length",
    )
