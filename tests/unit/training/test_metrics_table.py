"""The metrics of a run as a table in long form."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.metrics_table import COLUMNS, read_metrics
from tests.unit.config.helpers import small


def run_with(folder: Path, *records: dict[str, object]) -> RunFolder:
    run = RunFolder(folder)
    run.claim(validate(small()))
    for record in records:
        run.append_metrics(dict(record))
    return run


def test_read_metrics_has_a_row_for_each_value_with_task_and_method(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    name = validate(small()).adapter_names[0]
    step = {"kind": "step", "step": 2, "seconds": 1.5, "tokens": 90, "tokens_per_second": 60.0}
    run = run_with(
        tmp_path / "run",
        {**step, "adapters": {name: {"loss": 3.25, "lr": 0.1}}},
        {"kind": "evaluation", "step": 2, "adapters": {name: {"loss": float("nan"), "bits_per_byte": 1.5}}},
    )
    table = read_metrics(run.path)
    assert list(table.columns) == list(COLUMNS)
    task, method = name.split("-")
    values = {row.metric: row for row in table[table.adapter == name].itertuples()}
    assert values.keys() == {"loss", "lr", "heldout_loss", "heldout_bits_per_byte"}
    assert {(row.step, row.task, row.method) for row in values.values()} == {(2, task, method)}
    assert (values["loss"].value, values["heldout_bits_per_byte"].value) == (3.25, 1.5)
    assert math.isnan(values["heldout_loss"].value)
    of_the_run = table[table.adapter.isna()]
    assert dict(zip(of_the_run.metric, of_the_run.value, strict=True)) == {
        "seconds": 1.5,
        "tokens": 90,
        "tokens_per_second": 60,
    }


def test_read_metrics_of_a_run_without_records_is_empty(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    table = read_metrics(str(run_with(tmp_path / "run").path))
    assert len(table) == 0
    assert list(table.columns) == list(COLUMNS)


def test_read_metrics_names_the_package_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        read_metrics(run.path)


def test_read_metrics_of_another_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    with pytest.raises(UserError, match="is not a run folder"):
        read_metrics(tmp_path)
