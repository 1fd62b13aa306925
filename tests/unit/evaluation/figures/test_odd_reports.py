"""Figures, baselines and confusion matrices of a saved report with odd values: each is refused in one line or
drawn everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flora_train.config.errors import UserError
from flora_train.evaluation.report.html import render_comparison, render_html
from flora_train.evaluation.report.joined_seeds import with_joined_seeds
from flora_train.evaluation.report.tables import as_csv, as_latex, as_markdown, scores_of
from flora_train.evaluation.report.terminal import print_figures
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import validate_results
from flora_train.export.model_card_results import card_results, tables
from tests.unit.evaluation.report.test_html import run

MARKUP = "</td></script><script>alert(1)</script>`|[x](y)\x1b[31m{{7*7}}\n"
ODD: list[Any] = [
    None, "", [], {}, float("nan"), float("inf"), -1, 0, 1e300, 1e99, 1 << 62, 1 << 70, [[[[1]]]],
    {"a": {"b": [1]}}, "text", MARKUP, True, [None],
]  # fmt: skip


def value(number: float) -> dict[str, Any]:
    return {"value": number, "low": number - 0.1, "high": number + 0.1, "excludes_zero": True}


def score(family: str, number: float) -> dict[str, Any]:
    return {"name": family, "family": family, "value": value(number)}


def figure(name: str, lower_is_better: bool, families: list[str], baseline: str) -> dict[str, Any]:
    pairs = [("a", "b"), ("a", "base"), ("b", "base"), ("a", baseline), ("b", baseline)]
    return {
        "task": "spam",
        "figure": name,
        "lower_is_better": lower_is_better,
        "examples": 40,
        "setting": "greedy",
        "confidence": 0.95,
        "contenders": [score(family, 0.5) for family in families],
        "over_seeds": [{**score("c", 0.4), "value": {**value(0.4), "deviation": 0.1}}],
        "baselines": [score(baseline, 0.3)],
        "differences": [{"first": first, "second": second, "value": value(0.2)} for first, second in pairs],
    }


def content() -> dict[str, Any]:
    """A report of two tasks with figures, one of them with a base, and small and large confusions."""
    report: dict[str, Any] = json.loads(json.dumps(run({"spam": {"a": -0.1, "b": -0.2}}, completions=[])))
    report["results"] = []
    report["figures"] = [
        figure("accuracy", False, ["a", "b"], "majority label"),
        figure("mse", True, ["a", "b"], "mean"),
        figure("contrastive_loss", True, ["base", "a", "b"], "other"),
        figure("own:function", False, ["base", "a", "b"], "other"),
    ]
    counts = [[(row * column) % 3 for column in range(22)] for row in range(22)]
    report["confusions"] = [
        {"task": "spam", "family": "a", "labels": ["x", "<u>"], "counts": [[3, 1], [0, 4]]},
        {"task": "spam", "family": "b", "labels": [f"l{i}" for i in range(22)], "counts": counts},
    ]
    return report


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values; of lists to the first and the last item."""
    yield path
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from places(inner, (*path, key))
    elif isinstance(node, list) and node:
        for index in {0, len(node) - 1}:
            yield from places(node[index], (*path, index))


def places_of(*keys: str) -> list[tuple[Any, ...]]:
    whole = content()
    return [path for key in keys for path in places(whole[key], (key,))]


def changed(path: tuple[Any, ...], odd: Any) -> dict[str, Any]:
    report = content()
    node: Any = report
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = odd
    return report


def draw_everywhere(report: Report) -> None:
    for page in (render_html(report), render_comparison({"one": report, "two": report})):
        assert page.count("<script") == 1
        assert "<u>" not in page
    joined = with_joined_seeds(report)
    print_figures(joined.figures, Console(quiet=True))
    for adapter in report.adapters:
        assert tables(report, adapter.name) is not None
        assert card_results(report, adapter.name) is not None
    scores = scores_of({"": report})
    if scores:
        assert as_csv(scores)
        assert as_markdown(scores)
        assert as_latex(scores)
    assert all(isinstance(number, float) for number in final_metrics(report).values())
    assert json.dumps(report.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize(
    "path", places_of("figures", "confusions"), ids=lambda path: ".".join(map(str, path))
)
@pytest.mark.quick("figures.0.contenders.0.family", "figures.3.figure", "confusions.0.labels.0", "confusions")
def test_odd_values_are_refused_in_one_line_or_drawn(path: tuple[Any, ...]) -> None:
    drawn: set[str] = set()
    for odd in ODD:
        try:
            report = validate_results(Path("report.json"), changed(path, odd), Report, "write it again")
        except UserError as error:
            (problem,) = error.problems
            assert "\n" not in str(problem)
            continue
        if report.model_dump_json() not in drawn:
            drawn.add(report.model_dump_json())
            draw_everywhere(report)


def test_a_figure_has_a_name() -> None:
    with pytest.raises(UserError, match=r"figures.0.figure: Value should have at least 1"):
        validate_results(Path("report.json"), changed(("figures", 0, "figure"), ""), Report, "write it again")


@pytest.mark.parametrize("families", [[], ["other"]])
def test_means_over_seeds_that_are_missing_are_named(families: list[str]) -> None:
    report = content()
    for adapter in report["adapters"]:
        adapter |= {"seeds_of": "c", "seed": 1}
    whole = validate_results(Path("report.json"), report, Report, "write it again")
    assert [row.family for row in with_joined_seeds(whole).figures[0].contenders] == ["c"]
    report["figures"][0]["over_seeds"] = [score(family, 0.4) for family in families]
    with pytest.raises(
        UserError, match="over_seeds of spam: the mean over the seeds of its adapters is missing"
    ):
        validate_results(Path("report.json"), report, Report, "write it again")
