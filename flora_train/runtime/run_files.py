"""RunFiles: paths of a run folder, and its run.json and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import ValidationError

from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonObject, JsonValue, parse_object, read_object
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.manifest import Manifest
from flora_train.runtime.metric_records import EvaluationRecord, Record, RecordKind, SavedMetrics, StepRecord
from flora_train.runtime.metrics_file import MetricsFile
from flora_train.runtime.run_info import RunInfo, first_problem


class RunFiles:
    """Paths and writers of one run. A file is written whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.run_json = path / "run.json"
        self.checkpoints = path / "checkpoints"
        self.best_adapters = self.checkpoints / "best"
        self.adapters = path / "adapters"
        self.evaluation = path / "eval"
        self.tensorboard = path / "tensorboard"
        self._metrics = MetricsFile(self.metrics)

    @property
    def finished(self) -> bool:
        return bool(self.known_facts.get("finished"))

    def facts(self) -> RunInfo:
        """The content of run.json. Raises UserError if it is damaged."""
        return self._validate(self._read_run_json())

    def _read_run_json(self) -> JsonObject:
        return read_object(self.run_json, "put it back from a copy, or train again into another output_dir")

    def _validate(self, content: JsonObject) -> RunInfo:
        try:
            return RunInfo.model_validate(content)
        except ValidationError as error:
            hint = f"is damaged ({first_problem(error)}): put it back from a copy"
            raise user_error(str(self.run_json), None, hint) from error

    @property
    def known_facts(self) -> JsonObject:
        """The content of run.json; empty if there is none, or one that was not written by flora_train."""
        if not self.run_json.is_file():
            return {}
        try:
            content = parse_object(self.run_json.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content.get("finished"), bool):
            return {}
        return content

    def write_run_json(self, content: Mapping[str, JsonValue]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.run_json, lambda path: path.write_text(text, encoding="utf-8"))

    def update_run_json(self, **content: Any) -> None:
        before = self._read_run_json()
        self._validate(before)
        self.write_run_json({**before, **content})

    @property
    def manifest(self) -> Manifest | None:
        """The files that the run may write; None if run.json does not list them."""
        return Manifest.read(self.known_facts.get("files"))

    def names(self, files: Iterable[str]) -> bool:
        """Whether the manifest has all these names."""
        manifest = self.manifest
        return manifest is not None and set(files) <= set(manifest.names)

    def add_files(self, names: Iterable[str]) -> None:
        """Add names to the manifest: paths below the folder, or patterns as in RUN_FILES."""
        manifest = self.manifest or Manifest.of(())
        extended = manifest | Manifest.of((), names)
        if extended != manifest:
            self.update_run_json(files=extended.to_json())

    def append_metrics(self, record: Record) -> None:
        self._metrics.append(record)

    @overload
    def read_metrics(self, kind: Literal["step"]) -> list[StepRecord]: ...

    @overload
    def read_metrics(self, kind: Literal["evaluation"]) -> list[EvaluationRecord]: ...

    def read_metrics(self, kind: RecordKind) -> list[StepRecord] | list[EvaluationRecord]:
        """The records of one kind (`step`, `evaluation`), oldest first. Raises UserError for a line that is
        no record.
        """
        return self._metrics.read(kind)

    @property
    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._metrics.size

    def metrics_digest(self, size: int) -> str:
        """SHA-256 of the first `size` bytes of metrics.jsonl."""
        return self._metrics.digest(size)

    def saved_metrics(self) -> SavedMetrics:
        """Flush metrics.jsonl to disk; returns its size and SHA-256."""
        return {
            "metrics_size": self._metrics.sync(),
            "metrics_sha256": self._metrics.digest(self.metrics_size),
        }

    def cut_metrics(self, size: int) -> None:
        """Drop what was written after metrics.jsonl had `size` bytes."""
        self._metrics.cut(size)

    def check_metrics(self) -> None:
        """Raises UserError if metrics.jsonl cannot be read, or is not what it was when the run finished."""
        self.read_metrics("step")
        facts = self.facts()
        size, sha256 = facts.metrics_size, facts.metrics_sha256
        if size is not None and (self.metrics_size != size or self.metrics_digest(size) != sha256):
            hint = (
                "is not what it was when the run finished: put it back from a copy, or train again "
                "(overwrite=true)"
            )
            raise user_error(str(self.metrics), None, hint)
