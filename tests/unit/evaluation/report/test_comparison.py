"""The comparison of runs: only results on the same examples are compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flora_train.cli import main
from flora_train.evaluation.report import comparison
from flora_train.evaluation.report.comparison import Measure, labels, verdicts
from flora_train.evaluation.report.formatting import number
from flora_train.evaluation.report.html import render_comparison
from flora_train.evaluation.report.types import Report

REPORTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"


@pytest.fixture(params=["quickstart", "speech_local", "multipl_e_local"])
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads((REPORTS / f"{request.param}.json").read_text(encoding="utf-8"))


def typed(runs: Sequence[dict[str, Any]]) -> list[Report]:
    return [Report.model_validate(run) for run in runs]


def measures(runs: Sequence[dict[str, Any]]) -> list[Measure]:
    return comparison.measures(typed(runs))


def settings(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return comparison.settings(typed(runs))


def seed_groups(runs: Sequence[dict[str, Any]]) -> list[list[int]]:
    return comparison.seed_groups(typed(runs))


def page_of(runs: dict[str, dict[str, Any]]) -> str:
    return render_comparison({name: Report.model_validate(run) for name, run in runs.items()})


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
    assert all(first == second for _, (first, second) in comparison.costs(typed([report, report])))


def test_a_method_that_is_clearly_better_wins_its_tasks_and_no_other(report: dict[str, Any]) -> None:
    found = measures([report, shifted(report, "flora", -10.0)])
    winners = {row.what: [cell.best for cell in row.cells if cell] for row in found[0].rows}
    tasks = {result["task"] for result in report["results"]}
    assert {what for what, best in winners.items() if any(best)} == {(task, "flora") for task in tasks}
    assert all(best == [False, True] for what, best in winners.items() if what[1] == "flora")
    text = verdicts(["one", "two"], found)
    adapters = sum(len(result["contenders"]) for result in report["results"])
    assert (
        f"Held-out loss: two is significantly better on {len(tasks)} of {adapters} comparable adapters."
        in text
    )


def test_suite_in_which_higher_is_better_is_compared_accordingly(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    for suite in other["code"]:
        for part in suite["languages"]:
            for d in part["differences"]:
                for key in ("value", "low", "high"):
                    d["pass_at"]["1"][key] += 2.0 * (d["first"] == "flora" and d["second"] == "base")
    for measure in measures([other, report]):
        for row in measure.rows:
            wins = measure.title.startswith("pass@") and row.what[1] == "flora"
            assert [cell.best for cell in row.cells if cell] == [wins, False]


def test_other_examples_are_not_compared(report: dict[str, Any]) -> None:
    other = shifted(report, "flora", -10.0)
    for task in other["tasks"]:
        task |= {"data_hash": "another", "heldout_hash": None}
    (held_out, *_) = measures([report, other])
    assert {row.note for row in held_out.rows} == {"not of the same examples"}
    assert not any(cell.best for row in held_out.rows for cell in row.cells if cell)
    assert "Held-out loss: the runs cannot be compared, as their examples differ." in verdicts(
        ["one", "two"], [held_out]
    )


def test_settings_that_differ_are_listed_and_the_page_names_both(report: dict[str, Any]) -> None:
    other = copy.deepcopy(report)
    other["facts"]["config"] = (
        other["facts"]["config"].replace("\nseed: 0\n", "\nseed: 7\n").replace("\nname: ", "\nname: x")
    )
    assert settings([report, other]) == [("seed", ["0", "7"])]
    page = page_of({"one": report, "<two>": other})
    assert "&lt;two&gt;" in page
    assert "<two>" not in page
    assert page.count("<script>") == 1


def with_seed(report: dict[str, Any], seed: int) -> dict[str, Any]:
    other = copy.deepcopy(report)
    other["facts"]["config"] = (
        other["facts"]["config"]
        .replace("\nseed: 0\n", f"\nseed: {seed}\n")
        .replace("\nname: ", f"\nname: s{seed}")
    )
    return other


def test_runs_that_differ_in_the_seed_alone_do_not_compete(report: dict[str, Any]) -> None:
    runs = [
        report,
        with_seed(shifted(report, "flora", -10.0), 1),
        with_seed(shifted(report, "flora", 10.0), 2),
    ]
    assert seed_groups(runs) == [[0, 1, 2]]
    found = measures(runs)
    assert not any(cell.best for measure in found for row in measure.rows for cell in row.cells if cell)
    names = comparison.with_seeds(["a", "b", "c"], typed(runs))
    assert names == ["a (seed 0)", "b (seed 1)", "c (seed 2)"]
    assert "differ only in the seed: none is better" in verdicts(names, found, seed_groups(runs))
    flora = next(row for row in found[0].rows if row.what[1] == "flora")
    value = next(c for c in report["results"][0]["contenders"] if c["family"] == "flora")["bits_per_byte"][
        "value"
    ]
    assert flora.seeds == [f"{value:.3f} ({number(value - 10.0)} to {number(value + 10.0)})"]
    page = page_of(dict(zip("abc", runs, strict=True)))
    assert "b (seed 1)" in page
    assert "over the seeds of a (seed 0) and b (seed 1) and c (seed 2)" in page


def test_seeds_of_one_configuration_win_together_or_not_at_all(report: dict[str, Any]) -> None:
    def other_rate(run: dict[str, Any]) -> dict[str, Any]:
        run = copy.deepcopy(run)
        run["facts"]["config"] += "\nextra: 1\n"
        return run

    better, worse = shifted(report, "flora", -10.0), shifted(report, "flora", 10.0)
    together = [
        other_rate(better),
        with_seed(report, 0),
        other_rate(with_seed(better, 1)),
        with_seed(report, 2),
    ]
    assert seed_groups(together) == [[0, 2], [1, 3]]
    (held_out, *_) = measures(together)
    row = next(row for row in held_out.rows if row.what[1] == "flora")
    assert [cell.best for cell in row.cells if cell] == [True, False, True, False]
    assert "a and c are significantly better on " in verdicts(list("abcd"), [held_out], seed_groups(together))
    mixed = [other_rate(better), report, other_rate(with_seed(worse, 1)), with_seed(report, 2)]
    row = next(row for row in measures(mixed)[0].rows if row.what[1] == "flora")
    assert not any(cell.best for cell in row.cells if cell)


def test_the_same_held_out_examples_are_compared_whatever_was_trained_on(report: dict[str, Any]) -> None:
    runs = [report, shifted(report, "flora", -10.0)]
    for i, run in enumerate(runs):
        for task in run["tasks"]:
            task |= {"data_hash": f"{i} {task['name']}", "heldout_hash": task["name"]}
    (held_out, *_) = measures(runs)
    assert {row.note for row in held_out.rows} == {""}
    assert any(cell.best for row in held_out.rows for cell in row.cells if cell)


@pytest.mark.parametrize("report", ["speech_local"], indirect=True)
def test_error_rates_on_other_clips_are_not_compared(report: dict[str, Any]) -> None:
    runs = [copy.deepcopy(report), report]
    for i, run in enumerate(runs):
        for task in run["tasks"]:
            task["test_hash"] = str(i)
    (rates,) = [measure for measure in measures(runs) if measure.title == "Error rate"]
    assert {row.note for row in rates.rows} == {"not of the same examples"}


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["outputs/a", "outputs/b/"], ["a", "b"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["a", "a"], ["a (1)", "a (2)"]),
    ],
)
def test_names_of_runs_are_their_distinguishing_parts(paths: list[str], expected: list[str]) -> None:
    assert labels(paths) == expected


@pytest.mark.parametrize("report", ["multipl_e_local"], indirect=True)
def test_by_command(report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text('{"finished": true}')
        (tmp_path / name / "config.yaml").write_text(report["facts"]["config"])
        (tmp_path / name / "eval" / "report.json").write_text(json.dumps(report))
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["report", *runs]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Held-out loss: no run is significantly better on any of ")
    assert Path(said[1]) == tmp_path / "comparison.html"
    assert "Comparison of runs" in (tmp_path / "comparison.html").read_text()
    assert main(["report", *runs, "--out", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()
    for run_list, file in ((runs[:1], "one.tex"), (runs, "both.csv")):
        assert main(["report", *run_list, "--table", str(tmp_path / file)]) == 0
        assert (tmp_path / file).exists()
    assert main(["report", *runs, "--out", "other.pdf"]) == 2
    assert main(["report", runs[0], "--out", "other.html"]) == 2
    assert main(["report", runs[0], str(tmp_path / "nowhere")]) == 2
    said_wrong = capsys.readouterr().err
    assert "out = 'other.pdf': is a page: give it a name that ends in .html" in said_wrong
    assert "out = 'other.html': is for several runs; the page of one run is in its folder" in said_wrong
    assert "is not a run folder" in said_wrong
    assert main(["report", runs[0]]) == 0
    assert (tmp_path / "a" / "eval" / "report.html").exists()
