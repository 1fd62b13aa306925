"""Predictions of a run's adapters: those of its final evaluation, or of its exports in plain PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.types import Report
from flora_train.runtime.run_folder import RunFolder

from .encoder import Encoder, predict
from .tasks import Predictions, StudyError, StudyTask


def read_run(run: Path) -> Report:
    """The report of a run."""
    return read_report(RunFolder(run))


def predict_all(
    run: Path, tasks: Sequence[StudyTask], encoder: Encoder, predictions: Predictions, *, plain_peft: bool
) -> None:
    """Write the predictions of all adapters of these tasks. A method is a family without its seed.

    plain_peft: load each exported adapter with plain transformers and PEFT, instead of reading what the run's
    final evaluation predicted.
    """
    by_key: Mapping[str, StudyTask] = {task.key: task for task in tasks}
    for adapter in read_run(run).adapters:
        task = by_key.get(adapter.task)
        if task is None:
            continue
        method, seed = adapter.seeds_of or adapter.family, adapter.seed
        if not plain_peft:
            predictions.write(method, task, seed, predicted_in_run(run, adapter.name, task))
            continue
        folder = run / "adapters" / adapter.name
        if predictions.has(method, task, seed) and _is_newer(predictions.file(method, task, seed), folder):
            continue
        predictions.write(method, task, seed, predict(task, load(folder, task, encoder), encoder))
        print(f"{adapter.name}: predicted", flush=True)


def predicted_in_run(run: Path, adapter: str, task: StudyTask) -> list[str]:
    """The labels that the final evaluation of a run predicted for the test texts. Raises StudyError if they
    are of other texts."""
    file = run / "eval" / "predictions" / f"{adapter}.jsonl"
    if not file.exists():
        raise StudyError(f"{file}: no such file; the run's final evaluation writes it")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if [row["label"] for row in rows] != list(task.test.labels):
        raise StudyError(f"{file}: predictions for other texts than the test set of {task.key}")
    return [row["predicted"] for row in rows]


def load(folder: Path, task: StudyTask, encoder: Encoder) -> Any:
    """The base with one exported adapter."""
    from peft import PeftModel

    if not folder.is_dir():
        raise StudyError(f"{folder}: no such folder; the run has not exported this adapter")
    return PeftModel.from_pretrained(encoder.classifier(len(task.labels)), folder).eval()


def _is_newer(file: Path, folder: Path) -> bool:
    """Whether predictions were made after the adapter, and not from an earlier run's."""
    weights = folder / "adapter_model.safetensors"
    return weights.exists() and file.stat().st_mtime > weights.stat().st_mtime
