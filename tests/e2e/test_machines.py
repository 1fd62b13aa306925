"""Machines with different files: all of them end, and the error names the machine (two processes here)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import launch_environment
from tests.forked import start

RECIPE = """
name: apart
num_threads: 1
model: {path: model, dtype: float32}
tasks:
  letters: {train: rows.jsonl}
adapters:
  lora: {method: lora, rank: 2, lr: 1e-3}
training: {steps: 2, max_length: 32}
"""
ON_MACHINE = """
import os
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # each is the only one of its machine
os.chdir(os.environ["MACHINES"] + os.environ["RANK"])
from flora_train.cli import main
raise SystemExit(main(["train", "recipe=recipe.yaml", "output_dir=" + os.environ["MACHINES"] + "run"]))
"""


@pytest.fixture
def machines(checkpoint: Path, tmp_path: Path) -> list[Path]:
    """Two folders with the same recipe, rows and model."""
    folders = [tmp_path / f"machine{rank}" for rank in range(2)]
    for folder in folders:
        shutil.copytree(checkpoint, folder / "model")
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "rows.jsonl").write_text(
            "\n".join(json.dumps({"prompt": "ab", "completion": "c" * (i % 9)}) for i in range(40))
        )
    return folders


def train_on(machines: list[Path]) -> tuple[list[int], list[str]]:
    """Of each machine its exit status, and what it says."""
    folder = machines[0].parent
    environment = launch_environment(folder / "cache") | {"MACHINES": str(folder / "machine")}
    processes = start(["-c", ON_MACHINE], environment, processes=2)
    try:
        done = [process.wait(timeout=90) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [one.returncode for one in done], [one.stderr for one in done]


def test_the_same_files_train(machines: list[Path]) -> None:
    statuses, said = train_on(machines)
    assert statuses == [0, 0], said


def test_file_missing_on_one_machine_is_named_and_ends_all(machines: list[Path]) -> None:
    (machines[1] / "rows.jsonl").unlink()
    statuses, said = train_on(machines)
    assert statuses == [2, 2], said
    for machine in said:
        assert "error: tasks.letters.train = 'rows.jsonl': no such file" in machine
    assert "(on process 1 on " in said[0]
    assert not (machines[0].parent / "machinerun").exists()


def test_failure_on_one_machine_ends_all(machines: list[Path]) -> None:
    """Not an error of ours: a weight file that is cut off."""
    weights = machines[1] / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    statuses, said = train_on(machines)
    assert all(statuses), said
    assert "error: " in said[0]
    assert "process 1 on " in said[0]


def test_another_recipe_on_one_machine_is_recognised_before_data_is_read(machines: list[Path]) -> None:
    """Of those that differ each key is named; what decides how the machines talk to each other, too."""
    (machines[1] / "recipe.yaml").write_text(
        RECIPE.replace("dtype: float32", "dtype: float32, fsdp: true").replace("1e-3", "1e-2")
    )
    statuses, said = train_on(machines)
    assert statuses == [2, 2], said
    assert (
        "error: model.fsdp = True: is False on process 0: give every machine the same recipe and files"
        in said[1]
    )
    assert "error: adapters.lora.lr = 0.01: is 0.001 on process 0" in said[0]


@pytest.mark.parametrize("other", ["rows", "model"])
def test_other_files_on_one_machine_are_recognised(other: str, machines: list[Path]) -> None:
    if other == "rows":
        with (machines[1] / "rows.jsonl").open("a") as file:
            file.write('\n{"prompt": "one", "completion": "more"}\n')
    else:
        weights = load_file(machines[1] / "model" / "model.safetensors")
        changed = {name: weight + 1e-3 for name, weight in weights.items()}
        save_file(changed, machines[1] / "model" / "model.safetensors", {"format": "pt"})
    statuses, said = train_on(machines)
    assert statuses == [2, 2], said
    key = "examples of tasks.letters (SHA-256)" if other == "rows" else "weights of the base model (SHA-256)"
    assert f"error: {key} = " in said[0]
    assert "on process 0: give every machine the same recipe and files" in said[0]
    assert not (machines[0].parent / "machinerun").exists()
