"""Whole runs on preferences: every objective beside text, references of every kind, processes and kills."""

from __future__ import annotations

import json
import re
import shutil
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flora_train.cli import main
from tests.e2e.conftest import Launch
from tests.e2e.test_resume import Kill, kill_after

__all__ = ["kill_after"]

OBJECTIVES = ("dpo", "ipo", "orpo", "kto", "sft")


def pair(number: int) -> dict[str, Any]:
    first, second = number % 7, number % 5
    prompt = f"what is {first} + {second}"
    right, wrong = f"it is {first + second}.", f"it might be {first * second + 1} or so."
    return {"prompt": prompt, "chosen": right, "rejected": wrong}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A task of each objective and one of text, with two methods each."""
    folder = tmp_path_factory.mktemp("preferences")
    pairs = [pair(number) for number in range(40)]
    labelled = []
    for number, row in enumerate(pairs):
        good = number % 2 == 0
        completion = row["chosen"] if good else row["rejected"]
        labelled.append({"prompt": row["prompt"], "completion": completion, "label": good})
    files = {
        "pairs": write_rows(folder / "pairs.jsonl", pairs),
        "labelled": write_rows(folder / "labelled.jsonl", labelled),
        "text": write_rows(folder / "text.jsonl", [{"text": row["prompt"]} for row in pairs]),
    }
    tasks: dict[str, Any] = {name: {"train": files["pairs"], "objective": name} for name in OBJECTIVES}
    tasks["kto"]["train"] = files["labelled"]
    tasks["dpo"] |= {"label_smoothing": 0.1, "sft_weight": 0.2}
    tasks["ipo"]["reference"] = "cached"
    tasks["text"] = {"train": files["text"]}
    content = {
        "name": "preferences",
        "num_threads": 1,
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "tasks": tasks,
        "adapters": {
            "lora": {"method": "lora", "rank": 2, "lr": 0.02, "dropout": 0.1},
            "flora": {"method": "flora", "rank": 2, "lr": 0.05},
        },
        "mixture": {"examples_per_draw": 2},
        "training": {
            "steps": 12,
            "tokens_per_step": 1500,
            "tokens_per_microbatch": 600,
            "max_length": 64,
            "log_every": 3,
            "save_every": 3,
        },
        "evaluation": {"interval": 6, "max_new_tokens": 4, "bootstrap_samples": 100},
    }
    path = folder / "preferences.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(preferences: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    done = launch(f"recipe={preferences}", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def adapters_of(run: Path) -> dict[str, bytes]:
    files = sorted((run / "adapters").glob("*/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}


def test_a_plan_states_the_disk_that_preferences_take(
    preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"recipe={preferences}", f"output_dir={tmp_path / 'run'}"]) == 0
    assert re.search(r"tokens +[\d.]+ kB on disk for 240 rows in ", capsys.readouterr().out)


def test_every_objective_learns_beside_text(finished: Path) -> None:
    assert len(adapters_of(finished)) == 12
    first, *_, last = records(finished, "step")
    for objective in OBJECTIVES:
        name = f"{objective}-lora"
        assert last["adapters"][name]["loss"] < first["adapters"][name]["loss"], name
        has_rewards = "reward_accuracy" in last["adapters"][name]
        assert has_rewards == (objective != "sft")
    evaluated = records(finished, "evaluation")[-1]["adapters"]
    for objective in ("dpo", "ipo", "orpo", "kto"):
        assert evaluated[f"{objective}-lora"]["reward_margin"] > 0
        assert 0 <= evaluated[f"{objective}-lora"]["reward_accuracy"] <= 1
    assert "reward_margin" not in evaluated["text-lora"]


def test_two_processes_equal_one(finished: Path, preferences: Path, launch: Launch, tmp_path: Path) -> None:
    two = tmp_path / "two"
    done = launch(f"recipe={preferences}", f"output_dir={two}", processes=2)
    assert done.returncode == 0, done.stderr
    assert largest_difference(finished, two) <= 1e-6


def test_two_processes_that_divide_the_base_equal_one(
    finished: Path, preferences: Path, launch: Launch, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    done = launch(f"recipe={preferences}", f"output_dir={two}", "model.fsdp=true", processes=2)
    assert done.returncode == 0, done.stderr
    assert "every process holds 1/2 of the base" in done.stderr
    assert largest_difference(finished, two) <= 1e-6


def margins(result: dict[str, Any]) -> list[float]:
    """The reward margin of every contender in a report."""
    return [contender["reward_margin"]["value"] for contender in result["contenders"]]


def largest_difference(run: Path, other: Path) -> float:
    differences = []
    for name in adapters_of(run):
        file = f"adapters/{name}/adapter_model.safetensors"
        left, right = load_file(run / file), load_file(other / file)
        differences += [float((left[key] - right[key]).abs().max()) for key in left]
    return max(differences)


def test_a_killed_run_resumes_to_the_same_bytes(
    preferences: Path, launch: Launch, kill_after: Kill, tmp_path: Path
) -> None:
    words = (f"recipe={preferences}", "training.steps=60", "evaluation.interval=20")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(*words, f"output_dir={whole}").returncode == 0
    kill_after(9, parts, *words, f"output_dir={parts}", "resume=true")
    last = launch(*words, f"output_dir={parts}", "resume=true")
    assert last.returncode == 0, last.stderr
    assert "resuming after step" in last.stderr
    assert adapters_of(parts) == adapters_of(whole)


def test_the_reference_of_an_adapter_with_init_from_is_its_initial_state(
    finished: Path, preferences: Path, launch: Launch, tmp_path: Path
) -> None:
    """At step 0, DPO compares the adapter with itself. A resumed or evaluated run reads the reference, or
    computes it again from the source."""
    run = tmp_path / "run"
    words = (
        f"recipe={preferences}",
        f"output_dir={run}",
        *(f"tasks.{task}=null" for task in ("orpo", "sft", "text")),
        "adapters.flora=null",
        "adapters.lora.rank=null",
        f"adapters.lora.init_from={finished}/adapters/{{task}}-lora",
        "tasks.dpo.sft_weight=0",
        "tasks.dpo.label_smoothing=0",
    )
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    before, *_, after = records(run, "evaluation")
    assert before["step"] == 0
    assert before["adapters"]["dpo-lora"]["loss"] == pytest.approx(log(2), abs=1e-6)
    assert before["adapters"]["kto-lora"]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert after["adapters"]["dpo-lora"]["loss"] < log(2)
    files = sorted(run.glob("references/*.safetensors"))
    assert [file.name.split(".")[0] for file in files] == ["dpo-lora", "ipo-lora", "kto-lora"]
    report = json.loads((run / "eval" / "report.json").read_text())
    references = [{name: tensor.clone() for name, tensor in load_file(file).items()} for file in files]
    files[0].write_bytes(files[0].read_bytes()[:-9])  # damaged
    files[1].unlink()
    assert main(["evaluate", str(run)]) == 0
    for file, values in zip(files, references, strict=True):
        again = load_file(file)
        for part in ("validation.0", "validation.1", "validation.2"):
            assert (part in again) == (part in values)
            assert part not in values or torch.allclose(again[part], values[part], atol=1e-6)
    evaluated = json.loads((run / "eval" / "report.json").read_text())
    assert [margins(result) for result in evaluated["preferences"]] == [
        pytest.approx(margins(result), abs=1e-5) for result in report["preferences"]
    ]


@pytest.fixture
def refuse(
    preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Any:
    """Train on these rows with these settings; returns the problems."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(task: str, rows: list[dict[str, Any]] | None, *words: str) -> str:
        others = [f"tasks.{name}=null" for name in (*OBJECTIVES, "text") if name != task]
        words = (f"recipe={preferences}", f"output_dir={tmp_path / 'run'}", *others, *words)
        if rows is not None:
            words += (f"tasks.{task}.train={write_rows(tmp_path / 'rows.jsonl', rows)}",)
        assert main(["train", *words]) == 2
        return capfd.readouterr().err

    return refuse


PAIRS = [pair(number) for number in range(20)]


def test_bad_rows_are_named_with_file_and_number(refuse: Any) -> None:
    same = [*PAIRS[:16], {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}, *PAIRS[17:]]
    told = refuse("dpo", same)
    assert "tasks.dpo.rejected = 'rejected': is the same as 'chosen' in rows.jsonl, row 17" in told
    missing = [*PAIRS[:3], {"prompt": "x", "chosen": "y"}, *PAIRS[4:]]
    assert "tasks.dpo.rejected: has no 'rejected' in rows.jsonl, row 4" in refuse("dpo", missing)
    absent = [{"prompt": "x", "chosen": "y"}] * 20
    assert "tasks.dpo.rejected = 'rejected': is not a column of the training rows" in refuse("dpo", absent)
    labelled = [{"prompt": "x", "completion": f"y{i}", "label": i % 2 == 0} for i in range(20)]
    for label, told_of in ((None, "is missing in rows.jsonl, row 6"), (1, "is 1, which is neither true nor")):
        rows = [*labelled[:5], {**labelled[5], "label": label}, *labelled[6:]]
        assert f"tasks.kto.label = 'label': {told_of}" in refuse("kto", rows)
    alike = [{**row, "label": True} for row in labelled]
    assert "tasks.kto.label: is true in all training rows" in refuse("kto", alike)


@pytest.mark.parametrize(
    ("task", "words", "problem"),
    [
        ("dpo", ["tasks.dpo.beta=0"], "tasks.dpo.beta = 0: must be more than 0"),
        ("dpo", ["tasks.dpo.beta=-1"], "tasks.dpo.beta = -1: must be more than 0"),
        ("dpo", ["tasks.dpo.packing=true"], "tasks.dpo.packing = True: has no meaning for preferences"),
        ("dpo", ["tasks.dpo.label=x"], "tasks.dpo.label = 'x': has no meaning for objective dpo"),
        ("dpo", ["tasks.dpo.truncation=split"], "tasks.dpo.truncation = 'split': cannot divide"),
        ("dpo", ["tasks.dpo.messages=chosen"], "tasks.dpo.messages = 'chosen': has no meaning for prefer"),
        ("text", ["tasks.text.beta=0.1"], "tasks.text.beta = 0.1: requires objective"),
        ("text", ["tasks.text.chosen=x"], "tasks.text.chosen = 'x': requires objective"),
        (
            "kto",
            ["mixture.examples_per_draw=1"],
            "mixture.examples_per_draw = 1: is too small for the objective kto of tasks.kto",
        ),
        (
            "kto",
            ["mixture.examples_per_draw=6"],
            "training.tokens_per_microbatch = 600: cannot hold a draw of 6 examples of task 'kto'",
        ),
        (
            "dpo",
            ["training.tokens_per_microbatch=70"],
            "training.tokens_per_microbatch = 70: cannot hold a pair of task 'dpo'",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    refuse: Any, task: str, words: list[str], problem: str
) -> None:
    assert problem in refuse(task, None, *words)


def test_a_reference_of_another_base_is_refused(refuse: Any, finished: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "adapters" / "dpo-lora", adapter)
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "base_model_name_or_path": "other/base"}))
    words = ("adapters.flora=null", "adapters.lora.rank=null", f"adapters.lora.init_from={adapter}")
    told = refuse("dpo", None, *words)
    assert "is the reference of tasks.dpo, and was trained on the base model other/base" in told


@pytest.mark.parametrize("objective", ["ipo", "kto", "sft"])
def test_a_plan_measures_preferences(
    objective: str, preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the reference is computed before training, which a plan does not do."""
    others = [f"tasks.{name}=null" for name in (*OBJECTIVES, "text") if name != objective]
    words = [f"recipe={preferences}", f"output_dir={tmp_path / 'run'}", *others]
    if objective == "kto":
        words.append("tasks.kto.reference=cached")
    assert main(["plan", *words]) == 0
    planned = capsys.readouterr().out
    assert "activations of a micro-batch" in planned
    assert "on disk for 40 rows" in planned


def test_a_plan_without_rows_counts_both_documents_of_a_pair(
    preferences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [f"tasks.{name}=null" for name in (*OBJECTIVES, "text") if name != "dpo"]
    words = [f"recipe={preferences}", f"output_dir={tmp_path / 'run'}", *others, "training.max_length=115"]
    words += ["tasks.dpo.train={hub: some/pairs}", "training.tokens_per_step=9000"]
    assert main(["plan", *words]) == 0
    planned = capsys.readouterr().out
    assert "of preferences, one completion is counted" in planned
    assert "at most 1.0 kB a row on disk" in planned
