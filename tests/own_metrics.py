"""Metrics of a user's own, as tasks name them: `tests.own_metrics:share`."""

from __future__ import annotations

from typing import Any


def share(predictions: list[Any], references: list[Any]) -> float:
    """Share of examples that are predicted right: labels, lists of labels, or tags."""
    return sum(p == y for p, y in zip(predictions, references, strict=True)) / len(references)


def fruit_found(predictions: list[str], references: list[str]) -> float:
    """Recall of one label, which is no mean over examples."""
    fruit = [p for p, y in zip(predictions, references, strict=True) if y == "fruit"]
    return fruit.count("fruit") / len(fruit)


def largest_error(predictions: list[float], references: list[float]) -> float:
    """The largest difference between two numbers."""
    return max(abs(p - y) for p, y in zip(predictions, references, strict=True))


largest_error.lower_is_better = True  # type: ignore[attr-defined]


def text(predictions: list[Any], references: list[Any]) -> str:
    """What is no number."""
    return "good"


def not_a_number(predictions: list[Any], references: list[Any]) -> float:
    """What is no finite number."""
    return float("nan")


def knows_other_labels(predictions: list[str], references: list[str]) -> float:
    """A mapping without the labels of the rows."""
    rank = {"good": 1, "bad": 0}
    return sum(rank[p] for p in predictions) / len(predictions)


number = 3
