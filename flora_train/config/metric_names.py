"""Metrics that a task can name: those that this package knows, and functions of the user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from flora_train.config.base import Text
from flora_train.config.errors import choices, did_you_mean

OF_LOSS = ("perplexity",)
"""Metrics that are computed from the held-out loss."""
SACREBLEU = ("chrf", "bleu")
"""Metrics that sacrebleu computes."""
OF_ANSWERS = ("exact_match", "rouge_l", *SACREBLEU)
"""Metrics of texts that are generated for held-out prompts."""
METRICS = (*OF_LOSS, *OF_ANSWERS)

OF_LABELS = {
    "single": ("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "mcc", "auroc"),
    "multi": ("micro_f1", "macro_f1", "subset_accuracy", "auroc"),
    "regression": ("mse", "mae", "r2", "pearson", "spearman"),
    "tokens": ("token_accuracy", "token_macro_f1", "entity_f1"),
}
"""Type of a task of labels -> its figures, which no key has to name. entity_f1 is of tags such as B-PER."""
OF_EMBEDDINGS = ("recall_at_1", "mrr")
"""Figures of tasks of embeddings, beside their loss."""
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""module:function"""


def is_function(metric: str) -> bool:
    """Whether a metric is a function of the user's own."""
    return ":" in metric


def functions_of(metrics: Sequence[str]) -> list[str]:
    """The functions of the user's own among metrics."""
    return [metric for metric in metrics if is_function(metric)]


def _check_metric(metric: str) -> str:
    if metric in METRICS or FUNCTION.fullmatch(metric):
        return metric
    if ":" in metric or "/" in metric or metric.endswith(".py"):
        raise ValueError(
            "is no function: write module:function, such as my_metrics:score for a file my_metrics.py in the "
            "folder that the run is started in"
        )
    if any(metric in figures for figures in OF_LABELS.values()):
        raise ValueError("needs no key: it is measured of every task whose texts have such labels; remove it")
    hint = f"is not a metric; there are {choices(METRICS)}, or a function of your own as module:function."
    raise ValueError(hint + did_you_mean(metric, METRICS))


def _check_selection(figure: str) -> str:
    figures = sorted({*OF_EMBEDDINGS, *chain.from_iterable(OF_LABELS.values())})
    if figure in figures or FUNCTION.fullmatch(figure):
        return figure
    hint = f"is not a figure; there are {choices(('loss', *figures))}, or a function as module:function."
    raise ValueError(hint + did_you_mean(figure, figures))


def _as_default(value: Any) -> Any:
    return None if value == "loss" else value


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _each_once(metrics: list[str]) -> list[str]:
    repeated = [metric for metric in metrics if metrics.count(metric) > 1]
    if repeated:
        raise ValueError(f"names {repeated[0]} twice: remove one")
    return metrics


Metrics = Annotated[
    list[Annotated[Text, AfterValidator(_check_metric)]],
    BeforeValidator(_one_or_several),
    AfterValidator(_each_once),
]

SelectionFigure = Annotated[
    Annotated[Text, AfterValidator(_check_selection)] | None, BeforeValidator(_as_default)
]
"""A figure of held-out labels or embeddings; None: the held-out loss."""
