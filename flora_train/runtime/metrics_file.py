"""metrics.jsonl: a line per record, appended while a run trains. Checkpoints record its size and SHA-256."""

from __future__ import annotations

import json
import math
import os
from hashlib import sha256
from pathlib import Path
from typing import Literal, cast, overload

from flora_train.config.errors import first_line, user_error
from flora_train.config.json_format import JsonObject, parse_object
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.journal import append_line, whole_lines
from flora_train.runtime.metric_records import EvaluationRecord, Record, RecordKind, StepRecord


class MetricsFile:
    """Reads and writes the records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hashed = 0, sha256()

    def append(self, record: Record) -> None:
        """Append a record. Raises UserError if the disk is full; then the file holds what it held before."""
        append_line(self.path, json.dumps(_finite(record), allow_nan=False))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> int:
        """Flush the file to disk; returns its size."""
        if self.path.exists():
            with disk_errors(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.size

    def digest(self, size: int) -> str:
        """SHA-256 of the first `size` bytes. Bytes that were hashed before are not read again."""
        hashed, digest = self._hashed if self._hashed[0] <= size else (0, sha256())
        if hashed < size:
            digest = digest.copy()
            with self.path.open("rb") as file:
                file.seek(hashed)
                while hashed < size and (part := file.read(min(1 << 20, size - hashed))):
                    digest.update(part)
                    hashed += len(part)
        self._hashed = hashed, digest
        return digest.hexdigest()

    def cut(self, size: int) -> None:
        """Drop what was written after the file had `size` bytes."""
        if self.size > size:
            with disk_errors(self.path):
                os.truncate(self.path, size)
            self._hashed = 0, sha256()

    @overload
    def read(self, kind: Literal["step"]) -> list[StepRecord]: ...

    @overload
    def read(self, kind: Literal["evaluation"]) -> list[EvaluationRecord]: ...

    def read(self, kind: RecordKind) -> list[StepRecord] | list[EvaluationRecord]:
        """The records of one kind (`step`, `evaluation`), oldest first. Raises UserError for a line that is
        no record.
        """
        if not self.path.exists():
            return []
        if not self.path.is_file():
            hint = "is not a file: put it back from a copy, or train again (overwrite=true)"
            raise user_error(str(self.path), None, hint)
        lines = whole_lines(self.path.read_bytes()).split(b"\n")[:-1]
        records = [self._record(number, line) for number, line in enumerate(lines, 1)]
        of_kind = [record for record in records if record["kind"] == kind]
        if kind == "step":
            return cast(list[StepRecord], of_kind)
        return cast(list[EvaluationRecord], of_kind)

    def _record(self, number: int, line: bytes) -> JsonObject:
        try:
            record = parse_object(line)
            if not isinstance(record["kind"], str) or not isinstance(record.get("step", 0), int):
                raise ValueError("kind or step is of another type")
        except (ValueError, LookupError, RecursionError) as error:
            hint = "put the file back from a copy, or train again (overwrite=true)"
            raise user_error(
                f"{self.path}:{number}", None, f"is damaged ({first_line(error)}): {hint}"
            ) from error
        return record


def _finite(value: object) -> object:
    """The value with null in place of numbers that are not finite, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
