"""Whole runs of routed adapters: two processes, and problems that are told before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from flora_train.cli import main
from tests.e2e.conftest import Launch

ADAPTERS: dict[str, dict[str, Any]] = {
    "mix": {"method": "mixlora", "experts": 3, "rank": 2, "lr": 0.02, "dropout": 0.1, "jitter": 0.1},
    "fmix": {"method": "mixlora", "expert": "flora", "experts": 2, "top_k": 1, "rank": 2, "lr": 0.05},
    "lora": {"method": "lora", "rank": 2, "lr": 0.02},
}


@pytest.fixture(scope="module")
def routed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with routed adapters, in draws of two examples."""
    content = yaml.safe_load(recipe.read_text())
    content["name"] = "routed"
    content["adapters"] = ADAPTERS
    content["mixture"]["examples_per_draw"] = 2
    content["training"] |= {"tokens_per_step": 300, "tokens_per_microbatch": 80}
    path = tmp_path_factory.mktemp("routed") / "routed.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def last_record(run: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"][-1]["adapters"]


def largest_difference(run: Path, other: Path) -> float:
    files = sorted(path.relative_to(run) for path in run.glob("**/best/*.safetensors"))
    assert len(files) == 2 * len(ADAPTERS)
    differences = []
    for file in files:
        left, right = load_file(run / file), load_file(other / file)
        differences += [float((left[key].float() - right[key].float()).abs().max()) for key in left]
    return max(differences)


@pytest.fixture(scope="module")
def finished(routed: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    done = launch(f"recipe={routed}", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("words", [[], ["model.fsdp=true"]], ids=["whole base", "divided base"])
@pytest.mark.quick("whole base")
def test_two_processes_equal_one(
    words: list[str], routed: Path, finished: Path, launch: Launch, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    done = launch(f"recipe={routed}", f"output_dir={two}", *words, processes=2)
    assert done.returncode == 0, done.stderr
    assert largest_difference(finished, two) <= 1e-6
    one_record, two_record = last_record(finished), last_record(two)
    for name, metrics in one_record.items():
        assert metrics["loss"] == pytest.approx(two_record[name]["loss"], abs=1e-5)
        assert metrics.get("balance_loss") == pytest.approx(two_record[name].get("balance_loss"), abs=1e-5)
        assert ("balance_loss" in metrics) == (not name.endswith("-lora"))


def test_a_draw_that_no_microbatch_holds_is_refused(
    routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"recipe={routed}",
        f"output_dir={tmp_path}",
        "training.tokens_per_microbatch=20",
        "training.max_length=14",
    ]
    assert main(["train", *words]) != 0
    said = capsys.readouterr().err
    assert "training.tokens_per_microbatch = 20: cannot hold a draw of 2 examples of task 'letters'" in said
    assert "adapters.mix balances the load of its experts: raise it to" in said


def test_plan_and_doctor_know_experts(routed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", f"recipe={routed}"]) == 0
    said = capsys.readouterr().out
    assert "2 x mix, rank 2, 2 of 3 lora experts" in said
    assert "2 x fmix, rank 2, 1 of 2 flora experts" in said
    assert "2 down_proj 48 x 32 (2 of 3 experts)" in said
    assert "2 q_proj 32 x 32," in said
    assert main(["plan", f"recipe={routed}"]) == 0
    said = capsys.readouterr().out
    assert "2 x mix, rank 2, 2 of 3 lora experts: " in said
