"""Files of a run with what its heads predict for held-out texts: eval/predictions/ADAPTER.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from flora_train.adapters.bank import AdapterBank
from flora_train.config.json_format import JsonObject
from flora_train.runtime.atomic import write_atomically
from flora_train.training.heldout import HeldOut
from flora_train.training.label_heldout import HeldOutLabels

FOLDER = "predictions"
"""In the folder of the evaluation."""
DIGITS = 6
"""Decimals of probabilities."""


def write_predictions(folder: Path, bank: AdapterBank, heldout: Mapping[str, HeldOut]) -> None:
    """Write a file for each adapter with a head that was evaluated. They have labels, but no texts.

    folder: that of the evaluation; heldout: task -> its results. Raises UserError if a file cannot be
    written.
    """
    for result in heldout.values():
        if result.labels is None:
            continue
        for adapter in result.labels.outputs:
            path = folder / FOLDER / f"{bank.specs[adapter].name}.jsonl"
            lines = [json.dumps(row, ensure_ascii=False) for row in prediction_rows(result.labels, adapter)]
            _write(path, "".join(f"{line}\n" for line in lines))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def prediction_rows(labels: HeldOutLabels, adapter: int) -> Iterator[JsonObject]:
    """One record for each held-out text, in the order of the rows.

    `row`: its position among them, from 0; `label`: how it is labelled; `predicted`: in the same form;
    `probabilities`: label -> its probability, of tasks with one label and of multi_label. A number that is
    not finite is None, because JSON has none.
    """
    scores = labels.scores(adapter)
    pairs = zip(labels.references, labels.predictions(adapter), strict=True)
    for row, (label, predicted) in enumerate(pairs):
        if isinstance(predicted, float) and not math.isfinite(predicted):
            predicted = None
        record: JsonObject = {"row": row, "label": label, "predicted": predicted}  # type: ignore[dict-item]
        if scores is not None:
            probabilities = [_rounded(float(score)) for score in scores[row]]
            record["probabilities"] = dict(zip(labels.spec.labels, probabilities, strict=True))
        yield record


def _rounded(score: float) -> float | None:
    return round(score, DIGITS) if math.isfinite(score) else None
