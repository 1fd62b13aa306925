"""Two processes and one run folder: the second is refused; only the run's own files are ever deleted."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest

from tests.e2e.conftest import Launch, launch_environment
from tests.forked import Forked, python

TAKEN = "another process trains or evaluates in it"
LONG = ("training.steps=100000", "training.save_every=5", "evaluation.interval=null")


def wait_for(path: Path, process: Forked) -> None:
    patience = time.monotonic() + 120
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.said()
        assert time.monotonic() < patience
        time.sleep(0.02)


@pytest.fixture(scope="module")
def finished(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", "training.steps=4", "evaluation.interval=null")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def training(recipe: Path, tmp_path: Path) -> Iterator[tuple[Path, Forked]]:
    """A run that trains now."""
    folder = tmp_path / "run"
    process = Forked(
        ["train.py", f"recipe={recipe}", f"output_dir={folder}", *LONG],
        launch_environment(tmp_path / "cache"),
    )
    wait_for(folder / "checkpoints" / "step-*", process)
    yield folder, process
    process.kill()
    process.wait()


def test_a_run_that_trains_is_not_replaced_evaluated_or_exported(
    recipe: Path, training: tuple[Path, Forked], tmp_path: Path
) -> None:
    folder, process = training
    environment = launch_environment(tmp_path / "cache")
    calls = [
        ["train.py", f"recipe={recipe}", f"output_dir={folder}", "overwrite=true"],
        ["-m", "flora_train", "evaluate", str(folder)],
        ["-m", "flora_train", "export", str(folder)],
        ["-m", "flora_train", "export", str(folder), "--out", str(tmp_path / "out")],
        ["-m", "flora_train", "push", str(folder), "--repo", "me/x", "--dry-run"],
    ]
    for words in calls:
        done = python(*words, environment=environment)
        assert done.returncode == 2, (words, done.stderr)
        assert TAKEN in done.stderr
        assert "Traceback" not in done.stderr
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60).returncode == 75  # it saved, and was not disturbed
    assert not (tmp_path / "out").exists()


def test_the_lock_ends_with_a_process_that_is_killed(
    recipe: Path, training: tuple[Path, Forked], tmp_path: Path
) -> None:
    folder, process = training
    process.kill()
    process.wait()
    words = [
        f"recipe={recipe}",
        f"output_dir={folder}",
        "overwrite=true",
        "training.steps=2",
        "evaluation.interval=null",
    ]
    done = python("train.py", *words, environment=launch_environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run.json").read_text())["finished"]


def test_two_starts_with_resume_train_a_new_run_once(recipe: Path, tmp_path: Path) -> None:
    words = [
        f"recipe={recipe}",
        f"output_dir={tmp_path / 'run'}",
        "resume=true",
        "training.steps=12",
        "evaluation.interval=null",
    ]
    both = [Forked(["train.py", *words], launch_environment(tmp_path / "cache")) for _ in range(2)]
    done = [one.wait(120) for one in both]
    assert [one.returncode for one in done] == [0, 0], done
    assert sum("holds this run, finished; it is kept" in one.stderr for one in done) == 1
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)


def test_replace_deletes_what_the_run_wrote_and_nothing_else(
    finished: Path, recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    run = copytree(finished, tmp_path / "run")
    foreign = [
        "notes.txt",
        "adapters/notes.txt",
        "adapters/letters-lora/notes.txt",
        "eval/table.csv",
        "checkpoints/step-mine.safetensors",
    ]
    foreign += ["checkpoints/best/mine.safetensors", "eval/heldout/mine.jsonl"]
    for name in foreign:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    inner = copytree(finished, run / "older" / "run")
    before = {path: path.read_bytes() for path in inner.rglob("*") if path.is_file()}
    words = [
        f"recipe={recipe}",
        f"output_dir={run}",
        "overwrite=true",
        "training.steps=2",
        "adapters.ia3.tasks=[letters]",
    ]
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    assert all((run / name).read_text() == "mine" for name in foreign)
    assert {path: path.read_bytes() for path in before} == before
    assert not (run / "adapters" / "digits-ia3").exists()  # of the run that was replaced
    assert (run / "adapters" / "letters-ia3" / "adapter_config.json").exists()


def test_a_run_without_a_manifest_is_not_replaced(
    finished: Path, recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    run = copytree(finished, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    for files in (None, {"names": ["../../x"], "adapters": []}, {"names": "all", "adapters": []}, 3):
        (run / "run.json").write_text(
            json.dumps({**{k: v for k, v in facts.items() if k != "files"}, "files": files})
        )
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = launch(f"recipe={recipe}", f"output_dir={run}", "overwrite=true", "training.steps=2")
        assert done.returncode == 2
        assert "does not list its files (key files)" in done.stderr
        assert "delete the folder by hand" in done.stderr
        assert {path: path.read_bytes() for path in before} == before


def test_export_keeps_what_a_folder_holds(finished: Path, tmp_path: Path) -> None:
    run, out = copytree(finished, tmp_path / "run"), tmp_path / "out"
    (out / "letters-lora").mkdir(parents=True)
    (out / "letters-lora" / "adapter_config.json").write_text("{}")
    for kind in ("peft", "lora-svd", "merged"):
        done = python(
            "-m", "flora_train", "export", str(run), "letters-lora", "--as", kind, "--out", str(out)
        )
        assert done.returncode == 2, done.stderr
        assert "exists already: choose another" in done.stderr
    assert (out / "letters-lora" / "adapter_config.json").read_text() == "{}"
    (run / "adapters" / "letters-lora" / "notes.txt").write_text("mine")
    (run / "flora" / "letters-flora").mkdir(parents=True)
    (run / "flora" / "letters-flora" / "notes.txt").write_text("mine")
    assert python("-m", "flora_train", "export", str(run)).returncode == 0
    assert (run / "adapters" / "letters-lora" / "notes.txt").read_text() == "mine"
    refused = python("-m", "flora_train", "export", str(run), "--as", "flora")
    assert "exists already: choose another" in refused.stderr
    assert (run / "flora" / "letters-flora" / "notes.txt").read_text() == "mine"
