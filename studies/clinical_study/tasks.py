"""The tasks of recipe=clinical as the comparisons read them, and files of predictions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "assets" / "clinical_local"
SIZES = (50, 200, 1000)
SEEDS = (1, 2, 3)


class StudyError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


@dataclass(frozen=True)
class Labelled:
    """Texts with their labels."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class StudyTask:
    """One training set of one chapter (or of the e-mails), and its test set."""

    name: str
    """Such as ch01."""
    size: int
    """The number in the name of the training set, which may have fewer texts."""
    train: Labelled
    test: Labelled

    @property
    def key(self) -> str:
        """Its name in data_configs/clinical.yaml."""
        return f"{self.name}_n{self.size}"

    @cached_property
    def labels(self) -> list[str]:
        """The labels in the order of a head's outputs."""
        return sorted(set(self.train.labels))

    @cached_property
    def targets(self) -> list[int]:
        """Index of the label of each training text."""
        index = {label: i for i, label in enumerate(self.labels)}
        return [index[label] for label in self.train.labels]

    @cached_property
    def test_hash(self) -> str:
        """SHA-256 of the test set, which predictions belong to."""
        return hashlib.sha256("\n".join([*self.test.texts, *self.test.labels]).encode()).hexdigest()


def load_tasks(folder: Path, names: Iterable[str] = ()) -> list[StudyTask]:
    """All tasks in a folder of the builder, or those of the named chapters."""
    counts = folder / "counts.json"
    if not counts.exists():
        raise StudyError(f"{counts}: no such file; build it with: python assets/build_clinical_corpus.py")
    existing = [entry["name"] for entry in json.loads(counts.read_text(encoding="utf-8"))]
    chosen = list(names) or existing
    for name in chosen:
        if name not in existing:
            raise StudyError(f"--tasks {name}: no such task; there are {', '.join(existing)}")
    tasks = []
    for name in chosen:
        test = read_labelled(folder / f"{name}.test.jsonl")
        for size in SIZES:
            train = folder / f"{name}.n{size}.jsonl"
            if train.exists():
                tasks.append(StudyTask(name, size, read_labelled(train), test))
    return tasks


def read_labelled(file: Path) -> Labelled:
    """The texts and labels of a file of rows."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return Labelled(tuple(row["text"] for row in rows), tuple(row["label"] for row in rows))


@dataclass(frozen=True)
class Predictions:
    """Folder of predicted labels: a file for each method, task and seed."""

    folder: Path

    def file(self, method: str, task: StudyTask, seed: int) -> Path:
        return self.folder / method / f"{task.key}-{seed}.json"

    def write(self, method: str, task: StudyTask, seed: int, labels: list[str]) -> None:
        """Write the labels that were predicted for the test texts."""
        if len(labels) != len(task.test.labels):
            raise StudyError(f"{method} predicts {len(labels)} labels for {len(task.test.labels)} texts")
        file = self.file(method, task, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"test": task.test_hash, "labels": labels}), encoding="utf-8")
        partial.replace(file)

    def has(self, method: str, task: StudyTask, seed: int) -> bool:
        """Whether the predictions for this test set are there, so that a run can be continued."""
        file = self.file(method, task, seed)
        return file.exists() and json.loads(file.read_text(encoding="utf-8"))["test"] == task.test_hash

    def read(self, method: str, task: StudyTask) -> Iterator[tuple[int, list[str]]]:
        """(seed, predicted labels) of each seed. Raises StudyError for those of another test set."""
        for file in sorted((self.folder / method).glob(f"{task.key}-*.json")):
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["test"] != task.test_hash:
                raise StudyError(f"{file}: predictions for another test set; delete it and run again")
            yield int(file.stem.rpartition("-")[2]), content["labels"]

    def methods(self) -> list[str]:
        """The methods that have predictions."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())
