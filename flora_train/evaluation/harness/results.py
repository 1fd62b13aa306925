"""lm_eval's results of one contender: its tables, its metrics, and all of it as JSON."""

from __future__ import annotations

import json
from typing import Any

from lm_eval.utils import handle_non_serializable, make_table

from flora_train.evaluation.harness.requests import ContenderResults, Metric

STDERR = "_stderr"


def read_results(results: Any) -> ContenderResults:
    """What lm_eval computed, as it prints and writes it."""
    tables = [str(make_table(results))]
    if "groups" in results:
        tables.append(str(make_table(results, "groups")))
    metrics = []
    for task, values in results["results"].items():
        for key in sorted(values):
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith(STDERR):
                metrics.append(Metric(task, metric, filter_name, _written(values[key])))
    text = json.dumps(results, default=handle_non_serializable, ensure_ascii=False)
    return ContenderResults(tuple(tables), tuple(metrics), text)


def _written(value: Any) -> str:
    """A value as lm_eval's tables write it."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value)
