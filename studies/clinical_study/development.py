"""Macro-F1 of several settings of the comparison runs on the development texts, by which they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from flora_train.evaluation.figures.classification import label_statistic
from flora_train.evaluation.figures.statistic import values_of

from .bag_of_words import tfidf
from .encoder import Encoder, Settings, full, gated
from .scores import FIGURE
from .tasks import SIZES, StudyError, StudyTask

SEED = 1
RATES = {"gated": (1e-4, 3e-4, 1e-3, 3e-3), "full": (1e-4, 3e-4, 1e-3)}
STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
Predict = Callable[[StudyTask], list[str]]


def development(tasks: Sequence[StudyTask], encoder: Encoder, methods: Sequence[str]) -> Iterator[str]:
    """A line of a table for each setting of each method: means over the tasks of a size, and over all."""
    yield f"| method | setting | {' | '.join(f'{size:,}' for size in SIZES)} | mean |"
    yield f"|---|---|{'---|' * len(SIZES)}---|"
    for method in methods:
        for setting, predict in candidates(method, encoder).items():
            values = {task.key: macro_f1(task, predict) for task in tasks}
            means = []
            for size in SIZES:
                means.append(np.mean([values[task.key] for task in tasks if task.size == size]))
            cells = " | ".join(f"{mean:.3f}" for mean in [*means, np.mean(means)])
            yield f"| {method} | {setting} | {cells} |"


def candidates(method: str, encoder: Encoder) -> Mapping[str, Predict]:
    """Setting -> what predicts the labels of a task with it."""
    settings: dict[str, Predict] = {}
    for weights in (None, "balanced"):
        suffix = "" if weights is None else ", balanced"
        if method == "tfidf":
            for strength in STRENGTHS:
                settings[f"C = {strength:g}{suffix}"] = _tfidf(strength, weights)
        elif method in RATES:
            for lr in RATES[method]:
                chosen = Settings(lr=lr, balanced=weights is not None)
                settings[f"lr {lr:g}{suffix}"] = _trained(method, encoder, chosen)
        else:
            raise StudyError(f"--methods {method}: no settings to choose; there are tfidf, gated and full")
    return settings


def macro_f1(task: StudyTask, predict: Predict) -> float:
    """Macro-F1 on the test texts of a task."""
    statistic = label_statistic(predict(task), task.test.labels)
    return values_of(statistic, len(task.test.labels))[FIGURE] or 0.0


def _tfidf(strength: float, weights: str | None) -> Predict:
    return lambda task: tfidf(task, strength, weights)  # type: ignore[arg-type]


def _trained(method: str, encoder: Encoder, settings: Settings) -> Predict:
    train = {"gated": gated, "full": full}[method]
    return lambda task: train(task, encoder, SEED, settings)
