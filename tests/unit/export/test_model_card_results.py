"""Cards and the hub show the results of the run's report, for all committed reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub._eval_results import parse_eval_result_entries

from flora_train.evaluation.report.types import Report
from flora_train.export.model_card_results import benchmarks, card_results, tables

REPORTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def report(name: str) -> Report:
    return Report.model_validate(json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("run", "adapter", "titles"),
    [
        ("quickstart", "ruby-ia3", ["Held-out loss", "Programs that pass their tests: starter, Ruby"]),
        ("speech_local", "ro-flora", ["Held-out loss", "Error rates of words and characters"]),
    ],
)
def test_tables_name_every_method_and_mark_the_adapter(run: str, adapter: str, titles: list[str]) -> None:
    found = tables(report(run), adapter)
    assert [table.title for table in found] == titles
    for table in found:
        assert [row[0] for row in table.rows] == ["base model", "flora", "lora", "ia3"]
        assert table.rows[table.adapter_row][0] == adapter.partition("-")[2]
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert table.rows[0][-1] == ""
        assert all(" [" in row[-1] for row in table.rows[1:])


def test_benchmark_entries_hold_suites_of_the_hub_only() -> None:
    found = report("multipl_e_local")
    (suite,) = (suite for suite in found.code if suite.suite == "multipl_e")
    (lua,) = (language for language in suite.languages if language.language == "lua")
    (row,) = (row for row in lua.contenders if row.name == "lua-flora")
    assert row.pass_at[1].value is not None
    told = yaml.safe_load(yaml.safe_dump(benchmarks(found, "lua-flora")))
    (entry,) = parse_eval_result_entries(told)
    assert (entry.dataset_id, entry.task_id) == ("nuprl/MultiPL-E", "humaneval-lua")
    assert entry.value == pytest.approx(100 * row.pass_at[1].value, abs=0.005)
    assert entry.notes is not None
    assert "161 of 161 problems, 3 completions each" in entry.notes
    assert {result.metric for result in card_results(found, "lua-flora")} == {"bits_per_byte", "pass@1"}
    assert benchmarks(report("quickstart"), "lua-flora") == []


def test_card_results_are_empty_without_measurements() -> None:
    assert (
        tables(None, "lua-flora")
        == card_results(None, "lua-flora")
        == benchmarks(report("multipl_e_local"), "nobody")
        == []
    )
