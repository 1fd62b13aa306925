"""The table of all contenders has lm_eval's values, one column each."""

from __future__ import annotations

from rich.console import Console

from flora_train.evaluation.harness.comparison import side_by_side
from flora_train.evaluation.harness.requests import ContenderResults, Metric


def results(value: str) -> ContenderResults:
    task = "task\x1b[31m"
    return ContenderResults(
        (), (Metric(task, "acc", "none", value), Metric(task, "f1", "strict", "N/A")), "{}"
    )


def test_values_stand_side_by_side_without_terminal_codes() -> None:
    console = Console(width=100, record=True, force_terminal=False)
    console.print(side_by_side({"base": results("0.5000"), "a-lora": results("0.3333")}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["task", "metric", "filter", "base", "a-lora"]
    assert lines[1:] == [
        ["task\\x1b[31m", "acc", "none", "0.5000", "0.3333"],
        ["task\\x1b[31m", "f1", "strict", "N/A", "N/A"],
    ]
