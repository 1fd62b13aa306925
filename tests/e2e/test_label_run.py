"""A run of label tasks on an encoder, from the recipe to report, exports and a resumed evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import flora_train
from flora_train.config.load import validate
from tests.encoders import labelled_rows, save_encoder, write_rows

STEPS = 6


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    rows = write_rows(folder / "rows.jsonl", labelled_rows(60))
    source: dict[str, Any] = {"train": rows, "validation_fraction": 0.2}
    return {
        "name": "labels",
        "output_dir": str(folder / "runs"),
        "model": {"path": str(save_encoder(folder / "base"))},
        "tasks": {
            "kind": {**source, "label": "kind", "text": "text", "class_weights": "balanced"},
            "pair": {**source, "label": "kind", "text": ["text", "other"]},
            "flags": {**source, "label": "flags", "text": "text", "multi_label": True},
            "length": {**source, "label": "length", "text": "text", "regression": True},
            "tags": {**source, "token_labels": "tags", "text": "tokens"},
        },
        "adapters": {
            "head": {"method": "head", "lr": 1e-2},
            "flora": {"method": "flora", "lr": 1e-2, "head_lr": 2e-2},
            "lora": {"method": "lora", "lr": 1e-2},
            "ia3": {"method": "ia3", "lr": 1e-2, "tasks": ["kind", "tags"]},
        },
        "training": {"steps": STEPS, "tokens_per_step": 400, "tokens_per_microbatch": 300, "max_length": 32},
        "evaluation": {"interval": 3, "bootstrap_samples": 100},
        **changes,
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    return Path(flora_train.train(validate(recipe(folder))))


def test_two_processes_train_what_one_trains(run: Path, launch: Any, tmp_path: Path) -> None:
    settings = recipe(tmp_path, output_dir=str(tmp_path / "two"))
    settings["model"]["path"] = str(run.parent / "base")
    for task in settings["tasks"].values():
        task["train"] = str(run.parent / "rows.jsonl")
    (tmp_path / "labels.yaml").write_text(json.dumps(settings))
    done = launch(f"recipe={tmp_path / 'labels.yaml'}", "num_processes=2", processes=2)
    assert done.returncode == 0, done.stderr
    (two,) = (path.parent for path in (tmp_path / "two").rglob("run.json"))
    for folder in (run / "adapters").iterdir():
        one = load_file(folder / "adapter_model.safetensors")
        other = load_file(two / "adapters" / folder.name / "adapter_model.safetensors")
        for name, tensor in one.items():
            assert (tensor - other[name]).abs().max() <= 1e-5, (folder.name, name)


def test_merged_model_predicts_labels(run: Path, tmp_path: Path) -> None:
    """A plain model of transformers' class, with the names of the labels."""
    (folder,) = flora_train.export_adapters(run, ["kind-flora"], "merged", out=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "fruit", 1: "metal"}
    head = load_file(run / "adapters" / "kind-flora" / "adapter_model.safetensors")
    assert model.classifier.weight.equal(head["base_model.model.classifier.weight"])


def test_run_reports_figures_of_labels_and_exports_heads(run: Path) -> None:
    report = json.loads((run / "eval" / "report.json").read_text())
    figures = {(figure["task"], figure["figure"]) for figure in report["figures"]}
    assert {
        ("kind", "macro_f1"),
        ("flags", "micro_f1"),
        ("length", "mse"),
        ("tags", "token_accuracy"),
    } <= figures
    assert len(list((run / "adapters").iterdir())) == 17
    tensors = load_file(run / "adapters" / "kind-flora" / "adapter_model.safetensors")
    assert tensors["base_model.model.classifier.weight"].shape == (2, 32)
    config = json.loads((run / "adapters" / "tags-head" / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS"
    labels = json.loads((run / "adapters" / "kind-flora" / "labels.json").read_text())
    assert labels == {
        "problem_type": "single_label_classification",
        "id2label": {"0": "fruit", "1": "metal"},
    }
    card = (run / "adapters" / "kind-flora" / "README.md").read_text()
    assert 'labels = ["fruit", "metal"]' in card
