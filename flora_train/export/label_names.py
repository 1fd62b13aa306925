"""The names of a head's outputs, in a file beside the adapter: PEFT's own files have no place for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_train.data.labels.spec import LabelSpec
from flora_train.runtime.manifest import LABELS

PROBLEM_TYPES = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
    "tokens": "token_classification",
}
"""Type of the labels -> what transformers calls the problem."""


@dataclass(frozen=True)
class LabelNames:
    """The content of LABELS."""

    problem_type: str
    names: tuple[str, ...]
    """In the order of the outputs; empty for regression."""


def labels_content(labels: LabelSpec) -> dict[str, Any]:
    """What LABELS says, with transformers' own keys."""
    names = {str(number): name for number, name in enumerate(labels.labels)}
    return {"problem_type": PROBLEM_TYPES[labels.task_type], "id2label": names}


def read_labels(folder: Path) -> LabelNames | None:
    """The labels of the adapter in a folder; None if there is no readable file of them."""
    try:
        content = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        names: Mapping[str, Any] = content["id2label"]
        ordered = tuple(str(names[str(number)]) for number in range(len(names)))
        return LabelNames(str(content["problem_type"]), ordered)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
