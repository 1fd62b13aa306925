"""A run whose base model and data are on the hub: through failures, at one commit for its whole life, and
without a network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.test_resume import wait_for_a_checkpoint
from tests.e2e.test_run import adapter_bytes
from tests.forked import python, start
from tests.hub_server import TOKEN, Fault, Hub, serve

MODEL, DATA = "org/tiny", "org/rows"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub(checkpoint: Path, recipe: Path, tmp_path: Path) -> Iterator[Hub]:
    """The model and the tasks of the recipe as gated repositories."""
    for task in ("letters", "digits"):
        folder = tmp_path / "rows/data" / task
        folder.mkdir(parents=True)
        text = (recipe.parent / f"{task}.jsonl").read_text()
        lines = [json.dumps(json.loads(line)) for line in text.splitlines()]
        for number in range(3):
            part = "\n".join(lines[20 * number : 20 * number + 20])
            (folder / f"train-{number:05d}.jsonl").write_text(part + "\n")
    with serve() as hub:
        hub.add_folder(MODEL, checkpoint, gated=True)
        hub.add_folder(DATA, tmp_path / "rows", "dataset", gated=True)
        yield hub


@pytest.fixture
def words(hub: Hub, recipe: Path, tmp_path: Path) -> list[str]:
    """The recipe with base model and data of the hub."""
    content = yaml.safe_load(recipe.read_text())
    content["model"]["path"] = MODEL
    for task, value in content["tasks"].items():
        value["train"] = {"hub": DATA, "data_dir": f"data/{task}", "max_rows": 50}
    file = tmp_path / "hub.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return [f"recipe={file}"]


def environment(url: str | None, home: Path) -> dict[str, str]:
    ours = {
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    if url is None:
        return {**inherited, **ours, "HF_HUB_OFFLINE": "1"}
    return {**inherited, **ours, "HF_ENDPOINT": url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


@pytest.fixture
def train(hub: Hub, words: list[str], tmp_path: Path) -> Run:
    """`train("name", "key=value", ...)` into a folder of this name."""

    def run(
        name: str, *more: str, home: str = "home", processes: int = 1, offline: bool = False
    ) -> subprocess.CompletedProcess[str]:
        surroundings = environment(None if offline else hub.url, tmp_path / home)
        command = ["train.py", *words, f"output_dir={tmp_path / name}", *more]
        done = python(*command, environment=surroundings, processes=processes)
        assert done.returncode == 0, done.stderr
        return done

    return run


def facts(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text())
    return content


def results(run: Path) -> Any:
    report = json.loads((run / "eval" / "report.json").read_text())
    return [report["results"], report["curves"], report["tasks"], report["facts"]["hub_commits"]]


def change(hub: Hub) -> None:
    """A commit in which all rows and the model's configuration are different."""
    row = json.dumps({"prompt": "z", "completion": "zzzz"})
    hub.commit(f"datasets/{DATA}", {"data/letters/train-00000.jsonl": f"{row}\n".encode() * 50})
    config = hub.repos[MODEL].folders["main"] / "config.json"
    changed = {**json.loads(config.read_text()), "rms_norm_eps": 0.5}
    hub.commit(MODEL, {"config.json": json.dumps(changed).encode()})


@pytest.mark.full
def test_commits_are_recorded_and_a_run_with_failures_has_the_same_results(
    hub: Hub, train: Run, tmp_path: Path
) -> None:
    commits = {
        f"datasets/{DATA}@main": hub.repos[f"datasets/{DATA}"].head,
        f"models/{MODEL}@main": hub.repos[MODEL].head,
    }
    train("plain")
    assert facts(tmp_path / "plain")["hub_commits"] == commits
    assert results(tmp_path / "plain")[-1] == commits
    assert f"datasets/{DATA}@main" in (tmp_path / "plain/eval/report.html").read_text()
    hub.add_faults("all", Fault("commit", "*/resolve/*", times=3))
    train("failing", home="another", processes=2)
    assert len(hub.injected) > 6
    assert facts(tmp_path / "failing")["hub_commits"] == commits
    train("two", home="home", processes=2, offline=True)
    assert results(tmp_path / "failing") == results(tmp_path / "two")


def test_a_run_that_was_interrupted_ends_with_the_rows_that_it_began_with(
    hub: Hub, words: list[str], train: Run, tmp_path: Path
) -> None:
    steps = ("training.steps=40", "training.save_every=4")
    train("whole", *steps)
    parts = tmp_path / "parts"
    command = ["train.py", *words, f"output_dir={parts}", *steps]
    (process,) = start(command, environment(hub.url, tmp_path / "home"))
    wait_for_a_checkpoint(parts, 4, process.poll)
    os.kill(process.pid, signal.SIGTERM)
    assert "resume=true continues from there" in process.wait(60).stderr
    change(hub)
    done = train("parts", *steps, "resume=true", home="another machine")
    assert "resuming after step" in done.stderr
    assert adapter_bytes(parts) == adapter_bytes(tmp_path / "whole")
    assert results(parts) == results(tmp_path / "whole")


def test_a_finished_run_is_evaluated_on_what_it_was_trained_with(
    hub: Hub, train: Run, tmp_path: Path
) -> None:
    train("run", "training.steps=4", "evaluation.interval=null")
    before = results(tmp_path / "run")
    change(hub)
    surroundings = environment(hub.url, tmp_path / "another machine")
    done = python("-m", "flora_train", "evaluate", str(tmp_path / "run"), environment=surroundings)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")[0] == before[0]
    train("new", "training.steps=4", "evaluation.interval=null")
    assert facts(tmp_path / "new")["hub_commits"] != facts(tmp_path / "run")["hub_commits"]
    assert results(tmp_path / "new")[0] != before[0]


@pytest.mark.full
def test_a_run_needs_no_network_once_its_cache_is_filled(hub: Hub, train: Run, tmp_path: Path) -> None:
    train("online", "training.steps=4")
    hub.asked.clear()
    train("offline", "training.steps=4", offline=True)
    assert hub.asked == []
    assert results(tmp_path / "offline") == results(tmp_path / "online")
    assert adapter_bytes(tmp_path / "offline") == adapter_bytes(tmp_path / "online")
