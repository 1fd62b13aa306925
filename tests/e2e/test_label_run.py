"""A run of label tasks on an encoder, from the recipe to report, exports and a resumed evaluation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import flora_train
from flora_train.cli import main
from flora_train.config.load import validate
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.tables import scores_of
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.runtime.run_folder import RunFolder
from tests.e2e.conftest import launch_environment
from tests.encoders import labelled_rows, save_encoder, write_rows
from tests.forked import python, start

STEPS = 6
SHARE, ERROR = "tests.own_metrics:share", "tests.own_metrics:largest_error"


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    rows = write_rows(folder / "rows.jsonl", labelled_rows(60))
    source: dict[str, Any] = {"train": rows, "validation_fraction": 0.2}
    return {
        "name": "labels",
        "num_threads": 1,
        "output_dir": str(folder / "runs"),
        "model": {"path": str(save_encoder(folder / "base"))},
        "tasks": {
            "kind": {
                **source,
                "label": "kind",
                "text": "text",
                "class_weights": "balanced",
                "metrics": ["tests.own_metrics:share", "tests.own_metrics:fruit_found"],
            },
            "pair": {**source, "label": "kind", "text": ["text", "other"]},
            "flags": {**source, "label": "flags", "text": "text", "multi_label": True, "metrics": SHARE},
            "length": {**source, "label": "length", "text": "text", "regression": True, "metrics": ERROR},
            "tags": {**source, "token_labels": "tags", "text": "tokens", "metrics": SHARE},
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


def test_a_kill_in_the_final_evaluation_changes_no_figure(run: Path, tmp_path: Path) -> None:
    settings = recipe(tmp_path, output_dir=str(tmp_path / "killed"))
    settings["model"]["path"] = str(run.parent / "base")
    for task in settings["tasks"].values():
        task["train"] = str(run.parent / "rows.jsonl")
    (tmp_path / "labels.yaml").write_text(json.dumps(settings))
    words = ["train.py", f"recipe={tmp_path / 'labels.yaml'}"]
    environment = launch_environment(tmp_path / "cache")
    (process,) = start(words, environment)
    journal = tmp_path / "killed" / "eval" / "heldout" / "pieces-0.jsonl"
    deadline = time.monotonic() + 250
    while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.said()
        time.sleep(0.002)
    process.kill()
    process.wait(60)
    assert journal.exists()
    done = python(*words, "resume=true", environment=environment)
    assert done.returncode == 0, done.stderr
    assert not journal.parent.exists()
    killed, straight = read_report(RunFolder(tmp_path / "killed")), read_report(RunFolder(run))
    assert killed.figures == straight.figures
    assert killed.confusions == straight.confusions


def test_predictions_are_written_without_texts(run: Path) -> None:
    report = read_report(RunFolder(run))
    heads = {adapter.name: adapter.task for adapter in report.adapters}
    files = {path.stem: path.read_text().splitlines() for path in (run / "eval" / "predictions").iterdir()}
    assert files.keys() == heads.keys()
    sizes = {task: len(files[f"{task}-lora"]) for task in heads.values()}
    for name, lines in files.items():
        rows = [json.loads(line) for line in lines]
        assert [row["row"] for row in rows] == list(range(sizes[heads[name]]))
        assert rows[0].keys() <= {"row", "label", "predicted", "probabilities"}
    accuracy = {figure.task: figure for figure in report.figures if figure.figure == "accuracy"}
    rows = [json.loads(line) for line in files["kind-flora"]]
    assert all(row["predicted"] == max(row["probabilities"], key=row["probabilities"].get) for row in rows)
    hits = [row["predicted"] == row["label"] for row in rows]
    assert accuracy["kind"].by_family["flora"].value.value == pytest.approx(sum(hits) / len(hits))
    for task, form in (("flags", list), ("length", float), ("tags", list)):
        row = json.loads(files[f"{task}-lora"][0])
        assert isinstance(row["label"], form)
        assert isinstance(row["predicted"], form)


def test_merged_model_predicts_labels(run: Path, tmp_path: Path) -> None:
    """A plain model of transformers' class, with the names of the labels."""
    (folder,) = flora_train.export_adapters(run, ["kind-flora"], "merged", out=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "fruit", 1: "metal"}
    head = load_file(run / "adapters" / "kind-flora" / "adapter_model.safetensors")
    assert model.classifier.weight.equal(head["base_model.model.classifier.weight"])


def test_functions_of_the_users_own_are_figures_of_predicted_labels(run: Path, tmp_path: Path) -> None:
    report = read_report(RunFolder(run))
    figures = {(figure.task, figure.figure): figure for figure in report.figures}
    for task, same in (("kind", "accuracy"), ("flags", "subset_accuracy")):
        own, known = figures[task, SHARE], figures[task, same]
        assert own.by_family == known.by_family
        assert own.against("head") == known.against("head")
        assert [row.value.value for row in own.baselines] == [row.value.value for row in known.baselines]
    recall = figures["kind", "tests.own_metrics:fruit_found"].by_family
    for matrix in (matrix for matrix in report.confusions if matrix.task == "kind"):
        assert matrix.labels == ("fruit", "metal")
        fruit = matrix.counts[0]
        assert recall[matrix.family].value.value == pytest.approx(fruit[0] / sum(fruit))
    error = figures["length", ERROR]
    assert error.lower_is_better
    assert error.by_family["lora"].value.value >= figures["length", "mae"].by_family["lora"].value.value
    assert 0 <= figures["tags", SHARE].by_family["ia3"].value.value <= 1
    assert SHARE in (run / "eval" / "report.html").read_text()
    assert SHARE in (run / "adapters" / "flags-lora" / "README.md").read_text()
    assert "final/flags/lora/tests.own_metrics.share" in final_metrics(report)
    assert ("flags", SHARE) in {(row.task, row.metric.name) for row in scores_of({"": report})}


BAD = [
    ("tests.own_metrics:text", "returned the text 'good' for 12 held-out labels"),
    ("tests.own_metrics:not_a_number", "returned nan for 12 held-out labels"),
    ("tests.own_metrics:knows_other_labels", "raised KeyError: "),
    ("tests.own_metrics:number", "is no function, but of the type int"),
    ("tests.own_metrics:shares", "tests.own_metrics has no shares. Did you mean 'share'?"),
    ("tests.no_metrics:share", "there is no module tests.no_metrics"),
    ("rouge_l", "is of text that is written; of labels, figures are"),
    ("macro_f1", "needs no key"),
]


@pytest.mark.parametrize(("metric", "message"), BAD)
def test_a_wrong_function_is_one_error_before_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str, message: str
) -> None:
    settings = recipe(run.parent)
    task = {"kind": {**settings["tasks"]["kind"], "metrics": metric}}
    adapters = {"head": {"method": "head", "lr": 1e-2}}
    settings |= {"output_dir": str(tmp_path / "run"), "tasks": task, "adapters": adapters}
    (tmp_path / "bad.yaml").write_text(json.dumps(settings))
    for command in ("plan", "train"):
        assert main([command, f"recipe={tmp_path / 'bad.yaml'}"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: tasks.kind.metrics")
        assert message in line
    assert not (tmp_path / "run").exists()


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
