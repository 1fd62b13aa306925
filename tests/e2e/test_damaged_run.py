"""Damaged report.json and run.json, and unwritable places: a result, or one clear error."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.cli import main
from flora_train.config.errors import UserError
from flora_train.config.load import load_config
from flora_train.runtime.run_folder import RunFolder
from tests.conftest import at_most
from tests.e2e.conftest import Launch, launch_environment
from tests.forked import python

READONLY = "may not be written (Read-only file system): choose a place that can be written to"


@pytest.fixture(scope="module")
def finished(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", "training.steps=4", "evaluation.interval=2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(copytree(finished, tmp_path_factory.mktemp("copy") / "run"))


ODD = st.sampled_from(
    [None, True, -1, 0, 1e308, "", "text", "\x1b[31m", [], [None], {}, {"a": {}}, 10**30, [[]] * 3, "9" * 300]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all parts of a JSON value, of long lists the first items only."""
    yield path
    items = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, part in items:
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """new: what stands there instead; "gone": the key is gone."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new == "gone":
        del copy[path[0]]
    else:
        copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def one_line(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A result or one error."""
    status = main(words)
    said = capfd.readouterr().err
    assert status in (0, 2)
    assert "Traceback" not in said
    assert status == 0 or len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.attack
@at_most(12)
@given(data=st.data())
def test_a_changed_report_is_drawn_or_refused_in_one_line(
    data: st.DataObject, run: Path, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((finished / "eval" / "report.json").read_text())
    path = data.draw(st.sampled_from(sorted(set(places(report)), key=str)), label="path")
    new = data.draw(ODD | st.just("gone"), label="new")
    (run / "eval" / "report.json").write_text(
        json.dumps(changed(report, path, {} if new == "gone" and not path else new))
    )
    one_line(["report", str(run)], capfd)
    one_line(["report", str(run), str(finished), "--out", str(run.parent / "page.html")], capfd)
    one_line(["push", str(run), "--repo", "me/x", "--dry-run"], capfd)


TEXTS = [
    "",
    "null",
    "[]",
    "3",
    "{",
    "[" * 100_000,
    '{"a":' * 100_000,
    "NaN",
    '{"finished": NaN}',
    '{"schema": 5}',
    '{"schema_version": 7}',
    "9" * 10_000,
    "\ufeff{}",
    "{}",
]
FILES = ["run.json", "eval/report.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_a_damaged_file_is_one_line_in_every_command_that_reads_it(
    finished: Path, name: str, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copytree(finished, tmp_path / "run")
    (run / name).write_text(text)
    for words in (
        ["report", str(run)],
        ["report", str(finished), str(run), "--out", str(tmp_path / "page.html")],
        ["push", str(run), "--repo", "me/x", "--dry-run"],
    ):
        one_line(words, capfd)
    if name != "eval/report.json":
        for words in (
            ["evaluate", str(run)],
            ["export", str(run)],
            ["solve", str(run), "evaluation.problems=starter"],
        ):
            if name == "run.json" and text == "{}":
                continue
            one_line(words, capfd)


@pytest.mark.attack
@given(data=st.data())
def test_a_changed_run_json_is_read_or_refused(
    data: st.DataObject, run: Path, finished: Path, recipe: Path
) -> None:
    facts = json.loads((finished / "run.json").read_text())
    path = data.draw(st.sampled_from(sorted(set(places(facts)), key=str)), label="path")
    new = data.draw(ODD | st.just("gone"), label="new")
    (run / "run.json").write_text(json.dumps(changed(facts, path, {} if new == "gone" and not path else new)))
    for words in (["overwrite=true"], ["resume=true"], []):
        config = load_config(
            [f"recipe={recipe}", f"output_dir={run}", "training.steps=4", "evaluation.interval=2", *words]
        )
        for action in (RunFolder(run).status, lambda config: RunFolder(run).facts()):
            with suppress(UserError):
                action(config)


@pytest.fixture
def readonly(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A finished run on a file system that cannot be written to."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here (needs root): {mounted.stderr.strip()}")
    try:
        copytree(finished, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_every_command_says_in_one_line_that_a_file_system_is_read_only(
    readonly: Path, finished: Path, recipe: Path, tmp_path: Path
) -> None:
    out = str(readonly / "out")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    model = load_config([f"recipe={recipe}"]).model.path
    environment = {**launch_environment(readonly / "cache"), "XDG_CACHE_HOME": str(readonly / "cache")}
    lora = str(finished / "adapters" / "letters-lora")
    for words in (
        ["train", f"recipe={recipe}", f"output_dir={out}"],
        [
            "train",
            f"recipe={recipe}",
            f"output_dir={readonly / 'run'}",
            "training.steps=4",
            "evaluation.interval=2",
            "overwrite=true",
        ],
        ["init", str(tmp_path / "rows.jsonl"), "--model", model, "--out", f"{out}.yaml"],
        ["evaluate", str(readonly / "run")],
        ["report", str(readonly / "run")],
        ["report", str(readonly / "run"), str(finished), "--out", f"{out}.html"],
        ["export", str(readonly / "run")],
        ["export", str(finished), "letters-lora", "--as", "merged", "--out", out],
        ["export", str(finished), "letters-lora", "--out", out],
        ["convert", lora, "--out", out],
    ):
        done = python("-m", "flora_train", *words, environment=environment)
        assert done.returncode == 2, (words, done.stderr)
        assert READONLY in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    elsewhere = python(
        *(
            "-m",
            "flora_train",
            "export",
            str(readonly / "run"),
            "letters-lora",
            "--out",
            str(tmp_path / "out"),
        ),
        environment=environment,
    )
    assert elsewhere.returncode == 0, elsewhere.stderr  # what is only read may lie there


def test_obstacle_of_a_folder_or_file_is_named(finished: Path, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place, reason in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / "loop" / "run", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "is too long for a path"),
        (Path("/proc/self/run"), "No such file or directory"),
    ):
        for words in (
            ["train", f"recipe={recipe}", f"output_dir={place}"],
            ["export", str(finished), "letters-lora", "--out", str(place)],
        ):
            done = python("-m", "flora_train", *words, environment=os.environ)
            assert done.returncode == 2, (words, done.stderr)
            assert reason in done.stderr
            assert "Traceback" not in done.stderr
