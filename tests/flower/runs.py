"""Recipes, local runs to compare with, and what runs saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from flora_train.cli import main
from flora_train.federated.build_report import read_federated_report
from flora_train.federated.result_types import FederatedReport
from flora_train.federated.saved_run import SavedRun, read_saved, state_path
from flora_train.runtime.run_folder import RunFolder

STRATEGY = "only"


def recipe_of(material: Path, strategy: dict[str, Any], **federated: Any) -> dict[str, Any]:
    """A recipe with one strategy and three clients."""
    task = {"text": "text", "label": "kind", "train": str(material / "train.jsonl"), "license": "other"}
    options = {"lr": 0.05, "head_lr": 0.05, "lr_schedule": "constant"}
    factors = {**options, "target_modules": ["query", "value"]}
    adapters = {
        "lora": {"method": "lora", "rank": 4, **factors},
        "flora": {"method": "flora", "rank": 2, **factors},
        "ia3": {"method": "ia3", **options},
    }
    return {
        "name": "deployed",
        "tasks": {"kinds": {**task, "validation": str(material / "test.jsonl")}},
        "model": {"path": str(material / "bert"), "dtype": "float32"},
        "adapters": {strategy["adapter"]: adapters[strategy["adapter"]]},
        "federated": {
            "rounds": 2,
            "num_clients": 3,
            "dirichlet_alpha": 1.0,
            "batch_examples": 4,
            **federated,
            "strategies": {STRATEGY: strategy},
        },
        "training": {"steps": 2, "max_length": 32, "optimizer": "sgd"},
        "evaluation": {"bootstrap_samples": 100},
    }


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def saved_of(folder: Path) -> SavedRun:
    """What the rounds of a run saved."""
    saved = read_saved(state_path(folder, STRATEGY))
    assert saved is not None
    return saved


def report_of(folder: Path) -> FederatedReport:
    """The report of a run."""
    return read_federated_report(RunFolder(folder))


def run_locally(recipe: Path, folder: Path) -> SavedRun:
    """The same rounds as a simulation on this machine."""
    assert main(["train", f"recipe={recipe}", f"output_dir={folder}"]) == 0
    return saved_of(folder)


def global_values(saved: SavedRun) -> dict[str, Tensor]:
    """The values of the global adapter, and the weights of the base that rounds changed."""
    return {name: tensor for name, tensor in saved.tensors.items() if name.startswith(("values.", "base."))}


def assert_alike(ours: SavedRun, theirs: SavedRun) -> None:
    """The global adapters differ by 1e-5 at most."""
    mine, other = global_values(ours), global_values(theirs)
    assert mine.keys() == other.keys()
    assert mine
    for name, tensor in mine.items():
        assert float((tensor - other[name]).abs().max()) <= 1e-5, name
