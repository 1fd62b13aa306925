"""Metrics that a task can name: those that this package knows, and functions of the user's own."""

from __future__ import annotations

import re
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

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""module:function"""


def is_function(metric: str) -> bool:
    """Whether a metric is a function of the user's own."""
    return ":" in metric


def needs_answers(metrics: list[str]) -> bool:
    """Whether texts have to be generated for these metrics."""
    return any(metric not in OF_LOSS for metric in metrics)


def _check_metric(metric: str) -> str:
    if metric in METRICS or FUNCTION.fullmatch(metric):
        return metric
    if ":" in metric or "/" in metric or metric.endswith(".py"):
        raise ValueError(
            "is no function: write module:function, such as my_metrics:score for a file my_metrics.py in the "
            "folder that the run is started in"
        )
    hint = f"is not a metric; there are {choices(METRICS)}, or a function of your own as module:function."
    raise ValueError(hint + did_you_mean(metric, METRICS))


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
