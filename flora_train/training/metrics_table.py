"""read_metrics: the metrics of a run as a pandas DataFrame in long form."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flora_train.adapters.spec import expand
from flora_train.config.errors import user_error
from flora_train.runtime.metric_records import RecordKind
from flora_train.runtime.run_folder import open_run

if TYPE_CHECKING:
    import pandas

COLUMNS = ("step", "adapter", "task", "method", "metric", "value")
RUN_METRICS = ("seconds", "tokens", "tokens_per_second")
"""Metrics of a whole run, which have no adapter, task and method."""
PREFIXES: dict[RecordKind, str] = {"step": "", "evaluation": "heldout_"}
"""Kind of a record in metrics.jsonl -> beginning of its metrics' names."""


def read_metrics(run: str | os.PathLike[str]) -> pandas.DataFrame:
    """Read the metrics of a run, also while it trains.

    Args:
        run: The run folder.

    Returns:
        One row per value, with the columns `step`, `adapter`, `task`, `method` (flora, lora or ia3), `metric`
        and `value`. Metrics of training are `loss`, `lr`, `gradient_norm`, `tokens`, `skipped_steps` and
        `rollbacks`; those of held-out examples are `heldout_loss` and `heldout_bits_per_byte`. `seconds`,
        `tokens` and `tokens_per_second` of the whole run have no adapter.

    Raises:
        UserError: The folder holds no run, its metrics are damaged, or pandas is not installed.
    """
    if find_spec("pandas") is None:
        raise user_error("read_metrics", None, "needs pandas: pip install pandas")
    import pandas

    folder, config = open_run(run)
    specs = {spec.name: spec for spec in expand(config)}
    rows: list[tuple[Any, ...]] = []
    for kind, prefix in PREFIXES.items():
        for record in folder.read_metrics(kind):
            step = record["step"]
            rows += [
                (step, None, None, None, metric, record.get(metric))
                for metric in RUN_METRICS
                if metric in record
            ]
            for name, metrics in record["adapters"].items():
                spec = specs[name]
                for metric, value in metrics.items():
                    rows.append((step, name, spec.task, spec.method, prefix + metric, value))
    table = pandas.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"step": int, "value": float}).sort_values("step", kind="stable", ignore_index=True)
