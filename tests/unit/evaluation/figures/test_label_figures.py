"""Figures of label tasks: baselines, means over seeds, paired differences, confusions and their display."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from flora_train.evaluation.figures.intervals import ContenderNames, Contenders, Resampling
from flora_train.evaluation.figures.labels import LabelFigures, LabelPredictions, label_figures
from flora_train.evaluation.figures.result_types import FigureResult
from flora_train.evaluation.report.comparison import measures
from flora_train.evaluation.report.figure_tables import against_baselines
from flora_train.evaluation.report.html import render_comparison, render_html
from flora_train.evaluation.report.joined_report import with_joined_families
from flora_train.evaluation.report.joined_seeds import with_joined_seeds
from flora_train.evaluation.report.tables import scores_of
from flora_train.evaluation.report.terminal import print_figures
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.seeds import SeedGroup
from flora_train.export.model_card_results import card_results, tables
from tests.unit.evaluation.report.test_html import run

RESAMPLING = Resampling(samples=400, confidence=0.95, seed=1)
NAMES = {
    -1: ContenderNames("base", "base"),
    0: ContenderNames("spam-flora", "flora"),
    1: ContenderNames("spam-lora", "lora"),
}


@dataclass(frozen=True)
class Spec:
    task_type: Any
    labels: tuple[str, ...] = field(default=())


def by_figure(figures: LabelFigures) -> dict[str, FigureResult]:
    return {result.figure: result for result in figures.figures}


def single(**options: Any) -> LabelFigures:
    """90 of 100 examples have one label: the base always says so, and one of two adapters is mostly right."""
    references = np.repeat([0, 1, 2], [90, 6, 4])
    right = references.copy()
    right[0] = 1
    scores = np.full((100, 3), 0.1)
    scores[np.arange(100), right] = 0.8
    constant = LabelPredictions(np.zeros(100, dtype=int))
    predictions = {-1: constant, 0: LabelPredictions(right, scores), 1: constant}
    spec = Spec("single", ("ham", "<b>spam</b>", "other"))
    return label_figures(
        "spam", spec, predictions, references, contenders=Contenders(NAMES), resampling=RESAMPLING, **options
    )


def test_the_majority_stands_beside_the_adapters() -> None:
    figures = by_figure(single())
    accuracy, macro = figures["accuracy"], figures["macro_f1"]
    assert accuracy.baselines[0].family == "majority label"
    assert accuracy.baselines[0].value.value == accuracy.by_family["base"].value.value == 0.9
    assert accuracy.against("majority label")["flora"].excludes_zero
    assert not accuracy.against("majority label")["lora"].excludes_zero
    assert macro.to_base["flora"].value == pytest.approx(
        macro.by_family["flora"].value.value - macro.by_family["base"].value.value
    )
    assert against_baselines(list(figures.values())) == [
        "Accuracy is not clearly better than that of the majority label for 1 of 2 adapters: lora on spam."
    ]


def test_a_figure_is_shown_if_all_contenders_have_it() -> None:
    assert "auroc" not in by_figure(single())
    scores = LabelPredictions([0, 1, 1], np.array([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]))
    without = LabelPredictions([0, 1, 1])
    for predictions, figures in (({0: scores, 1: scores}, {"auroc"}), ({0: scores, 1: without}, set())):
        result = label_figures(
            "spam",
            Spec("single", ("a", "b")),
            predictions,
            [0, 1, 1],
            contenders=Contenders(NAMES),
            resampling=RESAMPLING,
        )
        assert by_figure(result).keys() & {"auroc"} == figures


def test_nothing_is_shown_without_examples() -> None:
    nothing = label_figures(
        "spam",
        Spec("single", ("a", "b")),
        {0: LabelPredictions([])},
        [],
        contenders=Contenders(NAMES),
        resampling=RESAMPLING,
    )
    assert nothing == LabelFigures([], [])


def test_confusions_count_examples() -> None:
    confusions = {matrix.family: matrix for matrix in single().confusions}
    assert confusions["base"].counts == ((90, 0, 0), (6, 0, 0), (4, 0, 0))
    assert sum(map(sum, confusions["flora"].counts)) == 100
    assert confusions["base"].largest_confusions[0] == ("<b>spam</b>", "ham", 6)


def test_the_majority_is_that_of_the_training_examples() -> None:
    figures = by_figure(single(training=[2, 2, 1], baselines={"words": LabelPredictions(np.zeros(100, int))}))
    values = {row.family: row.value.value for row in figures["accuracy"].baselines}
    assert values == {"majority label": 0.04, "words": 0.9}
    assert figures["accuracy"].against("words")["flora"].value == pytest.approx(0.99 - 0.9)


def test_seeds_have_a_mean_with_its_deviation() -> None:
    references = np.tile([0, 1], 30)
    generator = np.random.default_rng(0)
    predictions = {}
    for seed in range(3):
        wrong = generator.random(60) < 0.2
        predictions[seed] = LabelPredictions(np.where(wrong, 1 - references, references))
    names = {seed: ContenderNames(f"t-flora_{seed}", f"flora_{seed}") for seed in range(3)}
    groups = [SeedGroup("t", "flora", (0, 1, 2))]
    result = by_figure(
        label_figures(
            "t",
            Spec("single", ("a", "b")),
            predictions,
            references,
            contenders=Contenders(names, groups),
            resampling=RESAMPLING,
        )
    )["accuracy"]
    values = [row.value.value for row in result.contenders]
    (mean,) = result.over_seeds
    assert mean.value.value == pytest.approx(np.mean(values))
    assert mean.value.deviation == pytest.approx(np.std(values, ddof=1))
    assert result.against("majority label")["flora"].excludes_zero
    assert result.to_base == {}


def test_several_labels_numbers_and_tags() -> None:
    contenders = Contenders(NAMES)
    y = np.array([[1, 0], [1, 1], [0, 0], [1, 0]])
    probabilities = np.array([[0.9, 0.2], [0.8, 0.7], [0.1, 0.4], [0.7, 0.1]])
    multi = by_figure(
        label_figures(
            "spam",
            Spec("multi", ("a", "b")),
            {0: LabelPredictions(probabilities > 0.5, probabilities)},
            y,
            contenders=contenders,
            resampling=RESAMPLING,
        )
    )
    assert multi["subset_accuracy"].by_family["flora"].value.value == 1.0
    assert multi["auroc"].by_family["flora"].value.value == sklearn.metrics.roc_auc_score(y, probabilities)
    assert multi["auroc"].baselines == ()
    assert multi["micro_f1"].baselines[0].family == "majority of each label"
    numbers = by_figure(
        label_figures(
            "spam",
            Spec("regression"),
            {
                0: LabelPredictions(np.array([1.0, 2.0, 3.5])),
                1: LabelPredictions(np.array([1.0, np.nan, 3.0])),
            },
            [1.0, 2.0, 3.0],
            contenders=contenders,
            resampling=RESAMPLING,
        )
    )
    assert numbers["mse"].lower_is_better
    assert numbers["mse"].by_family["flora"].value.value == pytest.approx(0.25 / 3)
    assert numbers["mse"].by_family["lora"].value.value is None
    assert numbers["r2"].baselines[0].value.value == pytest.approx(0.0)
    assert numbers["pearson"].baselines[0].value.value is None
    tags = by_figure(
        label_figures(
            "spam",
            Spec("tokens", ("O", "B-PER", "I-PER")),
            {0: LabelPredictions([(0, 1, 2, 2, 0), (1, 1)])},
            [(0, 1, -100, 2, 0), (1, -100)],
            contenders=contenders,
            resampling=RESAMPLING,
        )
    )
    assert tags["entity_f1"].by_family["flora"].value.value == 1.0
    assert tags["token_accuracy"].baselines[0].value.value == pytest.approx(2 / 5)


@pytest.fixture
def report() -> Report:
    """A report with the figures, whose names of labels are markup."""
    content = run({"spam": {"flora": -0.1, "lora": -0.05}})
    figures = single()
    content["figures"] = [result.model_dump(mode="json") for result in figures.figures]
    content["confusions"] = [matrix.model_dump(mode="json") for matrix in figures.confusions]
    return Report.model_validate(content)


def test_figures_of_labels_are_shown(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    page = render_html(report)
    assert "<b>spam</b>" not in page
    assert "&lt;b&gt;spam&lt;/b&gt;" in page
    assert "Balanced accuracy, higher is better." in page
    assert "not clearly better than that of the majority label for 1 of 2" in page
    print_figures(report.figures)
    shown = capsys.readouterr().out
    assert "Macro F1, higher is better, percent" in shown
    assert "majority label" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "─" in line)
    metrics = final_metrics(report)
    assert metrics["final/spam/majority label/accuracy"] == 0.9
    rows = {(score.metric.name, score.method): score.value.value for score in scores_of({"": report})}
    assert rows["accuracy", "majority label"] == 0.9
    (table,) = [table for table in tables(report, "spam-flora") if table.title == "Figures"]
    assert [row[0] for row in table.rows] == ["base model", "flora", "lora", "majority label"]
    assert {"accuracy", "macro_f1", "mcc"} <= {metric.metric for metric in card_results(report, "spam-flora")}


def test_reports_with_figures_are_joined_and_read_again(report: Report) -> None:
    assert with_joined_seeds(report).figures == report.figures
    assert with_joined_families(report).figures == report.figures
    assert Report.model_validate_json(report.model_dump_json()) == report
    plain = report.replace(figures=(), confusions=())
    assert "figures" not in plain.model_dump(mode="json")
    wrong = report.model_dump(mode="json")
    wrong["figures"][0]["task"] = "nowhere"
    with pytest.raises(ValueError, match="figures: 'nowhere' is not described"):
        Report.model_validate(wrong)


def test_the_page_says_what_losses_and_baselines_are(report: Report) -> None:
    content = report.model_dump(mode="json")
    content["results"] = []
    for figure in content["figures"]:
        figure["contenders"] = [row for row in figure["contenders"] if row["family"] != "base"]
        figure["differences"] = [pair for pair in figure["differences"] if pair["second"] != "base"]
    content["tasks"][0]["test"] = content["tasks"][0]["validation"]
    page = render_html(Report.model_validate(content))
    assert "<figcaption>spam <small>cross-entropy</small></figcaption>" in page
    assert "A base model without a head predicts no labels, so that there is none on spam." in page
    assert "the majority label of the training rows" in page
    assert "The examples of spam are test rows" in page
    assert "difference to the base" not in page.partition('id="figures"')[2].partition("</section>")[0]
    assert 'rowspan="3">spam</th><td class="word">training</td>' in page


def test_the_terminal_has_no_empty_column(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    without = [figure.replace(differences=()) for figure in report.figures]
    print_figures(without)
    assert "difference to base" not in capsys.readouterr().out
    print_figures(report.figures)
    assert "difference to base" in capsys.readouterr().out
    for figures, columns in ((report.figures, ["difference to the base"]), (without, [])):
        card = tables(report.replace(figures=figures), "spam-flora")
        (table,) = [table for table in card if table.title == "Figures"]
        assert [column for column in table.columns if column.startswith("difference")] == columns
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_compared_runs_say_which_direction_is_better(report: Report) -> None:
    page = render_comparison({"one": report, "two": report})
    accuracy = page.partition(">Accuracy on held-out examples, percent</h2>")[2].partition("</section>")[0]
    losses = page.partition(">Held-out loss, bits per byte</h2>")[2].partition("</section>")[0]
    assert ("Higher is better." in accuracy, "Lower is better." in accuracy) == (True, False)
    assert ("Higher is better." in losses, "Lower is better." in losses) == (False, True)


def test_runs_with_other_test_rows_are_not_compared(report: Report) -> None:
    content = report.model_dump(mode="json")
    content["tasks"][0] |= {"heldout_hash": "same", "test_hash": "one"}
    other = json.loads(json.dumps(content))
    other["tasks"][0]["test_hash"] = "two"
    compared = measures([Report.model_validate(part) for part in (content, other)])
    notes = {measure.title: {row.note for row in measure.rows} for measure in compared}
    assert notes["Accuracy on held-out examples, percent"] == {"not of the same examples"}
    assert notes["Held-out loss, bits per byte"] == {"not of the same examples"}
