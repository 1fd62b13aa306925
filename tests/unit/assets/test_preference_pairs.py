"""Pairs of programs: which are made, and what the builder says about samples that it cannot use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from assets.preference_pairs.pairs import MOST_PAIRS, Sample, make_pairs
from flora_train.evaluation.code.problems.starter import load_starter_problems
from flora_train.evaluation.code.programs.execute import Program, Verdict, execute_all
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox, open_sandbox

ROOT = Path(__file__).resolve().parents[3]
PROBLEMS = ROOT / "assets/preference_problems"
SHIPPED = ROOT / "assets/preferences"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: eval/install_toolchains.sh")
    return open_sandbox("bubblewrap")


def program(name: str, text: str, status: str = "OK", **changes: Any) -> Sample:
    values = {
        "language": "lua",
        "name": name,
        "prompt": f"function {name}()",
        "completion": text,
        "adapter": "lua-lora",
        "sample": 0,
        "status": status,
        "passed": status == "OK",
        "whole": True,
    }
    return Sample(**{**values, **changes})


def texts(samples: list[Sample], most_pairs: int = 4) -> list[tuple[str, str]]:
    return [(pair.chosen.completion, pair.rejected.completion) for pair in make_pairs(samples, most_pairs)]


def test_a_pair_is_one_passing_and_one_failing_program_of_the_same_problem() -> None:
    samples = [program("p", "good"), program("q", "bad", "AssertionError")]
    assert texts(samples) == []
    samples += [program("p", "worse", "SyntaxError"), program("p", "bad", "AssertionError")]
    assert texts(samples) == [("good", "bad"), ("good", "worse")]
    assert make_pairs(samples, 4)[0].row() == {
        "prompt": "function p()",
        "chosen": "good",
        "rejected": "bad",
        "problem": "p",
        "chosen_from": "lua-lora",
        "rejected_from": "lua-lora",
        "rejected_status": "AssertionError",
    }


def test_programs_are_counted_once_and_a_problem_has_few_pairs() -> None:
    samples = [program("p", text) for text in ("a b", "ab", "a\n b", "c", "")]
    samples += [program("p", text, "Exception") for text in ("x", "x ", "y", "z")]
    assert texts(samples) == [("a b", "x"), ("c", "y"), ("a b", "z")]
    assert texts(samples, most_pairs=1) == [("a b", "x")]


@pytest.mark.parametrize(
    "changes",
    [
        {"whole": False},
        {"status": "SandboxViolation"},
        {"status": "OK", "passed": False},
    ],
    ids=["cut", "sandbox", "early-exit"],
)
def test_a_program_that_may_be_right_is_not_rejected(changes: dict[str, Any]) -> None:
    rejected = program("p", "bad", **{"status": "AssertionError", **changes})
    assert texts([program("p", "good"), rejected]) == []


def build(samples: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "assets/build_preference_pairs.py", str(samples), "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def write_samples(folder: Path, prompt_sha: str | None = None) -> None:
    """What `flora-train solve --out` leaves: a right and a wrong program for a problem of each table."""
    for table in ("training_problems", "heldout_problems"):
        problem = next(iter(load_starter_problems("lua", PROBLEMS / f"{table}.yaml").values()))
        suite = folder / table
        suite.mkdir(parents=True, exist_ok=True)
        settings = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 48, "seed": 1}
        (suite / "settings.json").write_text(json.dumps(settings))
        completions, verdicts = [], []
        programs = [
            ("base", "base", "OK"),
            ("lua-lora", "right", "OK"),
            ("lua-lora", "wrong", "AssertionError"),
        ]
        for number, (adapter, text, status) in enumerate(programs):
            key = {"adapter": adapter, "language": "lua", "name": problem.name, "sample": number}
            sha = prompt_sha or problem.sha
            completion = f"\n    return {text}\nend\n\nlocal function more()"
            completions.append({**key, "completion": completion, "ended": "stop", "prompt_sha": sha})
            verdicts.append({**key, "status": status})
        for name, rows in (("completions-0.jsonl", completions), ("verdicts.jsonl", verdicts)):
            (suite / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_builder_pairs_programs_of_adapters_up_to_their_stop_token(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples")
    finished = build(tmp_path / "samples", tmp_path / "pairs")
    assert finished.returncode == 0, finished.stderr
    for split in ("train", "validation"):
        (row,) = map(json.loads, (tmp_path / f"pairs/lua.{split}.jsonl").read_text().splitlines())
        assert row["chosen"] == "\n    return right\nend"
        assert row["rejected"] == "\n    return wrong\nend"
        assert row["prompt"].endswith(")")
        assert row["chosen_from"] == row["rejected_from"] == "lua-lora"
    notice = (tmp_path / "pairs/NOTICE.md").read_text()
    assert "temperature 0.9" in notice
    assert "1 pairs of 1 of 1 problems, from 1 programs that pass and 1 that do not" in notice


def test_builder_refuses_samples_of_other_problems_and_unfinished_ones(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", prompt_sha="0" * 64)
    finished = build(tmp_path / "samples", tmp_path / "pairs")
    assert finished.returncode == 1
    assert "is not the problem of" in finished.stderr
    write_samples(tmp_path / "samples")
    (tmp_path / "samples/training_problems/verdicts.jsonl").unlink()
    finished = build(tmp_path / "samples", tmp_path / "pairs")
    assert finished.returncode == 1
    assert "verdicts.jsonl: no such file; run flora-train solve to its end" in finished.stderr


@pytest.mark.parametrize("task", ["lua", "ruby"])
def test_shipped_pairs_are_of_our_own_problems_and_no_problem_is_in_both_splits(task: str) -> None:
    language = {"lua": "lua", "ruby": "rb"}[task]
    notice = (SHIPPED / "NOTICE.md").read_text(encoding="utf-8")
    for split, table in (("train", "training_problems"), ("validation", "heldout_problems")):
        problems = load_starter_problems(language, PROBLEMS / f"{table}.yaml")
        lines = (SHIPPED / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) >= 10
        assert f"{len(rows)} pairs of" in notice
        assert len({(row["chosen"], row["rejected"], row["problem"]) for row in rows}) == len(rows)
        for row in rows:
            problem = problems[row["problem"]]
            assert row["prompt"] == problem.prompt.rstrip()
            assert "".join(row["chosen"].split()) != "".join(row["rejected"].split())
            assert problem.cut(row["chosen"]) == row["chosen"]
            assert {row["chosen_from"], row["rejected_from"]} <= {f"{task}-flora", f"{task}-lora"}
        assert max(Counter(row["problem"] for row in rows).values()) <= MOST_PAIRS


@pytest.mark.parametrize("task", ["lua", "ruby"])
def test_shipped_pairs_pass_and_fail_as_they_say(task: str, sandbox: Sandbox) -> None:
    language = load_languages()[{"lua": "lua", "ruby": "rb"}[task]]
    if shutil.which(language.run[0]) is None:
        pytest.skip(f"{language.name} is not installed: eval/install_toolchains.sh {language.key}")
    problems = load_starter_problems(language.key, PROBLEMS / "heldout_problems.yaml")
    lines = (SHIPPED / f"{task}.validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for column, passes in (("chosen", True), ("rejected", False)):
        programs = [Program(language, problems[row["problem"]].program(row[column])) for row in rows]
        verdicts: dict[int, Verdict] = {}
        execute_all(programs, sandbox, workers=2, report=verdicts.__setitem__)
        assert [verdicts[number].status == "OK" for number in range(len(rows))] == [passes] * len(rows)
