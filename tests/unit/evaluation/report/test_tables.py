"""Results as CSV, Markdown and LaTeX: every number of the report, and text that cannot break a table."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.report.tables import (
    as_csv,
    as_latex,
    as_markdown,
    check_table_name,
    scores_of,
    write_table,
)
from flora_train.evaluation.report.types import Report

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"


@pytest.fixture(params=["quickstart", "speech_local"])
def report(request: pytest.FixtureRequest) -> Report:
    return Report.model_validate(json.loads((RESULTS / f"{request.param}.json").read_text(encoding="utf-8")))


def test_csv_has_a_line_per_task_and_method_with_the_numbers_of_the_report(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(scores_of({"run": report})))))
    losses = {(row["task"], row["method"]): row for row in rows if row["metric"] == "held-out bits per byte"}
    assert len(losses) == sum(1 + len(result.contenders) for result in report.results)
    for result in report.results:
        for contender in result.contenders:
            row = losses[result.task, contender.family]
            assert [float(row[key]) for key in ("value", "low", "high")] == list(
                contender.bits_per_byte.finite or ()
            )
            assert float(row["difference_to_base"]) == contender.difference_to_base.value
            assert row["clear"] == str(contender.difference_to_base.excludes_zero)
        assert losses[result.task, "base"]["difference_to_base"] == ""
    others = [row for row in rows if row["metric"] != "held-out bits per byte"]
    assert len(others) == sum(
        len(part.contenders) for suite in report.code for part in suite.languages
    ) + sum(len(part.contenders) for part in (report.speech.languages if report.speech else ()))


def test_markdown_has_a_row_per_task_and_a_column_per_method(report: Report) -> None:
    text = as_markdown(scores_of({"run": report}))
    assert f"| task | base | {' | '.join(report.families)} |" in text
    for result in report.results:
        (row,) = re.findall(rf"^\| {result.task} \|.*$", text.split("\n\n")[1], re.MULTILINE)
        assert row.count("[") == 1 + len(result.contenders)
        assert row.count("\\*") == sum(
            contender.difference_to_base.excludes_zero for contender in result.contenders
        )


def test_table_of_several_runs_names_the_run(report: Report) -> None:
    text = as_markdown(scores_of({"first": report, "second": report}))
    assert (
        text.count("| first | ")
        == text.count("| second | ")
        == len(report.results) * text.count("| run | task |")
    )


def test_latex_uses_booktabs_and_escapes_names(report: Report) -> None:
    text = as_latex(scores_of({"a_b & 100%": report, "c": report}))
    assert "a\\_b \\& 100\\%" in text
    assert (
        text.count("\\toprule")
        == text.count("\\midrule")
        == text.count("\\bottomrule")
        == text.count("\\begin{table}")
    )
    unescaped = re.sub(r"\\[&%$#_{}]", "", text)
    for row in re.findall(r"^    (\S.*) \\\\$", unescaped, re.MULTILINE):
        assert row.count("&") == 2 + len(report.families)


def test_table_marks_values_that_are_not_finite(report: Report) -> None:
    first = report.results[0]
    broken = first.base.bits_per_byte.replace(value=None, low=None, high=None, excludes_zero=False)
    result = first.replace(base=first.base.replace(bits_per_byte=broken))
    scores = scores_of({"run": report.replace(results=(result, *report.results[1:]))})
    assert f"| {first.task} | not finite |" in as_markdown(scores)
    assert f"{first.task},base,,,," in as_csv(scores)


def test_another_ending_is_refused(report: Report, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table = 'x.markdown': must end in .csv, .md or .tex"):
        check_table_name(Path("x.markdown"))
    with pytest.raises(UserError, match=r"Did you mean '.csv'"):
        write_table({"run": report}, tmp_path / "x.csvv")
    assert list(tmp_path.iterdir()) == []
