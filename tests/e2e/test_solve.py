"""flora-train solve: from a run to pass@k, killed and resumed, the same with one process and two."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Launch, launch_environment
from tests.forked import Forked, python

if subprocess.run(["sh", "-c", "command -v bwrap"], capture_output=True).returncode:
    pytest.skip("programs are executed in bubblewrap: eval/install_toolchains.sh sh", allow_module_level=True)

# a completion is commented out by its prompt, so that the tests alone decide
SOLVED = {"name": "solved", "prompt": "echo a #", "tests": "true", "stop_tokens": ["\n"]}
UNSOLVED = {"name": "unsolved", "prompt": "echo b c d e #", "tests": "false", "stop_tokens": ["\n"]}


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems") / "Trivial"
    folder.mkdir()
    (folder / "humaneval-sh.jsonl").write_text("\n".join(map(json.dumps, [SOLVED, UNSOLVED])))
    return folder


@pytest.fixture(scope="module")
def coded(recipe: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with problems: one task is in a language, the other is not."""
    content = yaml.safe_load(recipe.read_text())
    content["tasks"]["letters"]["language"] = "sh"
    content["evaluation"] |= {
        "problems": str(problems),
        "num_samples": 2,
        "pass_at_k": [1, 2],
        "max_new_tokens": 6,
    }
    path = tmp_path_factory.mktemp("recipe") / "coded.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(launch: Launch, coded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    done = launch(f"recipe={coded}", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "trivial problems: pass@k" in done.stdout
    return folder


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    return copytree(run, tmp_path / "run")


def solve(run: Path, *words: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    environment = launch_environment(run.parent / "cache")
    return python("eval/run.py", f"run={run}", *words, environment=environment, processes=processes)


def completions(folder: Path) -> dict[tuple[Any, ...], str]:
    """Key -> text; no key may stand twice."""
    rows = [
        json.loads(line)
        for file in folder.glob("completions-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    found = {(row["adapter"], row["language"], row["name"], row["sample"]): row["completion"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_run_with_problems_reports_pass_at_k_of_base_and_every_adapter_in_a_language(run: Path) -> None:
    (suite,) = json.loads((run / "eval" / "report.json").read_text())["code"]
    (part,) = suite["languages"]
    assert (part["language"], part["problems"]) == ("sh", 2)
    assert [c["name"] for c in part["contenders"]] == ["base", "letters-flora", "letters-lora", "letters-ia3"]
    for contender in part["contenders"]:
        assert contender["pass_at"]["1"]["value"] == contender["pass_at"]["2"]["value"] == 0.5
        assert contender["ended"]["OK"] == contender["ended"]["AssertionError"] == 2
    assert len(completions(run / "eval" / "trivial")) == 4 * 2 * 2
    page = (run / "eval" / "report.html").read_text()
    assert "Programs that pass their tests" in page
    assert "no program was executed" not in page


def test_more_samples_are_added_to_those_that_are_there(mine: Path) -> None:
    before = completions(mine / "eval" / "trivial")
    file = mine / "eval" / "report.json"
    unsolved = json.loads(file.read_text())  # as of a run without problems
    file.write_text(
        json.dumps(
            unsolved
            | {"code": [], "not_measured": ["Whether completions are correct: nothing was executed."]}
        )
    )
    done = solve(mine, "evaluation.num_samples=3", "--languages=sh")
    assert done.returncode == 0, done.stderr
    after = completions(mine / "eval" / "trivial")
    assert len(after) == 4 * 2 * 3
    assert before.items() <= after.items()
    report = json.loads(file.read_text())
    assert report["code"][0]["num_samples"] == 3
    assert report["not_measured"] == unsolved["not_measured"]


def test_a_report_of_another_version_is_refused_before_anything_is_written(mine: Path) -> None:
    before = completions(mine / "eval" / "trivial")
    file = mine / "eval" / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 1}))
    done = solve(mine, "evaluation.num_samples=3", "--languages=sh")
    assert done.returncode != 0
    assert "was written by an older version of flora-train (schema 1, " in done.stderr
    assert "flora-train evaluate" in done.stderr
    assert completions(mine / "eval" / "trivial") == before


def test_killed_generation_resumes_and_writes_the_same_as_an_uninterrupted_one(
    run: Path, tmp_path: Path
) -> None:
    words = ("evaluation.num_samples=40", "evaluation.batch_rows=8")
    whole = solve(run, *words, f"--out={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    parts, environment = tmp_path / "parts", launch_environment(tmp_path / "cache")
    for least in (20, 120):
        process = Forked(["eval/run.py", f"run={run}", *words, f"--out={parts}"], environment)
        patience = time.monotonic() + 120
        while (
            sum(file.read_bytes().count(b"\n") for file in parts.glob("trivial/completions-*.jsonl")) < least
        ):
            assert process.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.005)
        process.kill()
        process.wait()
        with (parts / "trivial" / "completions-0.jsonl").open("a") as file:
            file.write('{"adapter": "cut sho')  # as a kill in the middle of a line leaves it
    last = solve(run, *words, f"--out={parts}")
    assert last.returncode == 0, last.stderr
    assert completions(parts / "trivial") == completions(tmp_path / "whole" / "trivial")
    assert len(completions(parts / "trivial")) == 4 * 2 * 40


def test_two_processes_share_the_work_and_write_the_same(run: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = solve(
            run, "evaluation.num_samples=5", f"--out={tmp_path / str(processes)}", processes=processes
        )
        assert done.returncode == 0, done.stderr
    assert completions(tmp_path / "1" / "trivial") == completions(tmp_path / "2" / "trivial")
    files = sorted(tmp_path.glob("2/trivial/completions-*.jsonl"))
    assert [file.name for file in files] == ["completions-0.jsonl", "completions-1.jsonl"]
    assert all(file.read_text().count("\n") == 20 for file in files)


def test_a_peft_adapter_from_disk_is_one_more_contender_and_an_exported_one_writes_the_same(
    mine: Path, tmp_path: Path
) -> None:
    theirs = copytree(mine / "adapters" / "letters-flora", tmp_path / "theirs")
    words = (
        "evaluation.num_samples=1",
        "evaluation.pass_at_k=[1]",
        "evaluation.temperature=0",
        f"--contenders={theirs}",
        f"--out={tmp_path / 'out'}",
    )
    done = solve(mine, *words, f"--multipl-e={tmp_path / 'layout'}")
    assert done.returncode == 0, done.stderr
    found = completions(tmp_path / "out" / "trivial")
    assert len(found) == 5 * 2
    for name in ("solved", "unsolved"):
        assert found["theirs", "sh", name, 0] == found["letters-flora", "sh", name, 0]
    folder = tmp_path / "layout" / "humaneval-sh-theirs-0.0-reworded"
    assert sorted(path.name for path in folder.iterdir()) == ["solved.json.gz", "unsolved.json.gz"]
    again = python("-m", "flora_train", "execute", str(folder))
    assert "0.500" in again.stdout, again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluation.temperature=0.7"],
            r"temperature = 0.7: its completions were made with 0.2 and would be mixed",
        ),
        (["--languages=shh"], "evaluation.languages = 'shh': is not in eval/languages.yaml"),
        (["--languages=lua"], "evaluation.languages = 'lua': no task has this language; tasks have sh"),
        (
            ["evaluation.pass_at_k=[5]"],
            "evaluation.pass_at_k = [5]: pass@5 requires 5 completions per problem: raise num_samples = 2",
        ),
        (["evaluation.temperature=0"], "evaluation.temperature = 0: generates the same completion 2 times"),
        (["evaluation.problems=nowhere"], "evaluation.problems = 'nowhere': is not a folder"),
        (["evaluation.nn=2"], "evaluation.nn"),
        (
            ["language=[sh]"],
            "language = '[sh]': options of this command begin with --. Did you mean '--languages'?",
        ),
        (
            ["--contenders=nothing/here"],
            "contenders = 'nothing/here': is not a PEFT adapter's folder here, not in the local cache, and",
        ),
    ],
)
def test_bad_input_is_one_clear_error(run: Path, words: list[str], message: str) -> None:
    done = python(
        "-m", "flora_train", "solve", str(run), *words, environment=launch_environment(run.parent / "cache")
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_without_adapters_is_refused(mine: Path) -> None:
    for folder in (mine / "adapters").iterdir():
        folder.rename(mine / folder.name)
    done = solve(mine)
    assert "has no adapters: it did not finish" in done.stderr


def test_completions_of_other_prompts_or_other_adapters_are_not_mixed(mine: Path, problems: Path) -> None:
    folder = mine / "Trivial"
    folder.mkdir()
    changed = [SOLVED, {**UNSOLVED, "tests": "exit 1"}]
    (folder / "humaneval-sh.jsonl").write_text("\n".join(map(json.dumps, changed)))
    done = solve(mine, f"evaluation.problems={folder}")
    assert "was generated for another version of this problem" in done.stderr
    file = mine / "eval" / "trivial" / "completions-0.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "".join(json.dumps({**row, "adapter_sha": row["adapter_sha"] and "0" * 64}) + "\n" for row in rows)
    )
    assert "was generated with other weights of this adapter" in solve(mine).stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here (needs root): {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_during_generation_is_one_error_and_every_line_stays_whole(
    run: Path, small_disk: Path
) -> None:
    done = solve(run, "evaluation.num_samples=60", f"--out={small_disk / 'out'}")
    assert done.returncode != 0
    assert "the disk is full" in done.stderr
    assert 0 < len(completions(small_disk / "out" / "trivial")) < 4 * 2 * 60
