"""Predictions of a run's exported adapters, each loaded by plain transformers and PEFT."""

from __future__ import annotations

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


def predict_all(run: Path, tasks: Sequence[StudyTask], encoder: Encoder, predictions: Predictions) -> None:
    """Write the predictions of all adapters of these tasks. A method is a family without its seed."""
    by_key: Mapping[str, StudyTask] = {task.key: task for task in tasks}
    for adapter in read_run(run).adapters:
        task = by_key.get(adapter.task)
        if task is None:
            continue
        method, seed = adapter.seeds_of or adapter.family, adapter.seed
        folder = run / "adapters" / adapter.name
        if predictions.has(method, task, seed) and _is_newer(predictions.file(method, task, seed), folder):
            continue
        predictions.write(method, task, seed, predict(task, load(folder, task, encoder), encoder))
        print(f"{adapter.name}: predicted", flush=True)


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
