"""Runs beside each other: what is of the same examples is compared, what is not is said not to be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from flora_train.cli import main
from flora_train.evaluation.report.comparison import costs, labels, measures, settings, verdicts
from flora_train.evaluation.report.html import render_comparison
from flora_train.evaluation.results import SCHEMA

REPORTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


@pytest.fixture(params=["quickstart", "speech_local", "multipl_e_local"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((REPORTS / f"{request.param}.json").read_text(encoding="utf-8"))


def shifted(report: dict[str, Any], family: str, by: float) -> dict[str, Any]:
    """The same run with one method's held-out loss moved by so many bits per byte."""
    other = copy.deepcopy(report)
    for result in other["results"]:
        for row in result["contenders"]:
            if row["family"] == family:
                for key in ("value", "low", "high"):
                    row["bits_per_byte"][key] += by
                    row["difference_to_base"][key] += by
    return other


def test_a_run_beside_itself_shows_no_winner_and_no_difference(report: dict[str, Any]) -> None:
    found = measures([report, copy.deepcopy(report)])
    assert found
    for measure in found:
        for row in measure.rows:
            assert row.note == ""
            first, second = row.cells
            assert first is not None
            assert first == second
            assert not first.best
    assert settings([report, report]) == []
    assert all(first == second for _, (first, second) in costs([report, report]))


def test_a_method_that_is_clearly_better_wins_its_tasks_and_no_other(report: dict[str, Any]) -> None:
    found = measures([report, shifted(report, "flora", -10.0)])
    winners = {row.what: [cell.best for cell in row.cells if cell] for row in found[0].rows}
    tasks = {result["task"] for result in report["results"]}
    assert {what for what, best in winners.items() if any(best)} == {(task, "flora") for task in tasks}
    assert all(best == [False, True] for what, best in winners.items() if what[1] == "flora")
    text = verdicts(["one", "two"], found)
    adapters = sum(len(result["contenders"]) for result in report["results"])
    assert f"Held-out loss: clearly better is two on {len(tasks)} of {adapters} adapters that can be compared." in text


def test_a_suite_in_which_more_is_better_is_read_so(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    for suite in other["code"]:
        for part in suite["languages"]:
            for d in part["differences"]:
                for key in ("value", "low", "high"):
                    d["pass_at"]["1"][key] += 2.0 * (d["a"] == "flora" and d["b"] == "base")
    for measure in measures([other, report]):
        for row in measure.rows:
            wins = measure.title.startswith("pass@") and row.what[1] == "flora"
            assert [cell.best for cell in row.cells if cell] == [wins, False]


def test_other_examples_are_not_compared(report: dict[str, Any]) -> None:
    other = shifted(report, "flora", -10.0)
    for task in other["tasks"]:
        task["data_hash"] = "another"
    (held_out, *_) = measures([report, other])
    assert {row.note for row in held_out.rows} == {"not of the same examples"}
    assert not any(cell.best for row in held_out.rows for cell in row.cells if cell)
    assert "Held-out loss: nothing can be compared, the examples differ." in verdicts(["one", "two"], [held_out])


def test_settings_that_differ_are_listed_and_the_page_names_both(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["facts"]["config"] = other["facts"]["config"].replace("\nseed: 0\n", "\nseed: 7\n").replace("\nname: ", "\nname: x")
    assert settings([report, other]) == [("seed", ["0", "7"])]
    page = render_comparison({"one": report, "<two>": other})
    assert "&lt;two&gt;" in page
    assert "<two>" not in page
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["outputs/a", "outputs/b/"], ["a", "b"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["a", "a"], ["a (1)", "a (2)"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(paths: list[str], expected: list[str]) -> None:
    assert labels(paths) == expected


@pytest.mark.parametrize("report", ["multipl_e_local"], indirect=True)
def test_by_command(report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "config.yaml").write_text(report["facts"]["config"])
        (tmp_path / name / "eval" / "report.json").write_text(json.dumps({**report, "schema": SCHEMA}))
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["report", *runs]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Held-out loss: clearly better is none on any of ")
    assert Path(said[1]) == tmp_path / "comparison.html"
    assert "Comparison of runs" in (tmp_path / "comparison.html").read_text()
    assert main(["report", *runs, "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()
    assert main(["report", *runs, "--out", "other.pdf"]) == 2
    assert main(["report", runs[0], "--out", "other.html"]) == 2
    assert main(["report", runs[0], str(tmp_path / "nowhere")]) == 2
    said_wrong = capsys.readouterr().err
    assert "out = 'other.pdf': is a page: give it a name that ends in .html" in said_wrong
    assert "out = 'other.html': is for several runs beside each other" in said_wrong
    assert "is not a run folder" in said_wrong
    assert main(["report", runs[0]]) == 0
    assert (tmp_path / "a" / "eval" / "report.html").exists()
