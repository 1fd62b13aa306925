"""Preferences in the report: page, terminal, tables, comparison, trackers, cards and sweeps."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from flora_train.evaluation.preferences.score_types import PreferenceResult
from flora_train.evaluation.preferences.scores import ContenderNames, preference_result
from flora_train.evaluation.report import comparison
from flora_train.evaluation.report.html import render_comparison, render_html
from flora_train.evaluation.report.results import examples_hash
from flora_train.evaluation.report.summary_text import summarise
from flora_train.evaluation.report.sweeps import sweep_plots, winner_is_clear
from flora_train.evaluation.report.tables import as_csv, as_latex, as_markdown, scores_of
from flora_train.evaluation.report.terminal import print_preferences, print_results
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.report.types import Report
from flora_train.export.model_card_results import card_results, tables
from flora_train.training.preference_heldout import HeldOutPreferences, Objective
from tests.unit.evaluation.report.test_html import run
from tests.unit.training.harness import random_preferences

FAMILIES = ("flora", "lora")


def invented(task: str, objective: Objective, n: int, shift: float, *, beta: float = 0.1) -> PreferenceResult:
    """Figures of a task whose adapters raise the chosen completions by about `shift` nats."""
    generator = np.random.default_rng(n)
    chosen, rejected = -generator.uniform(20, 90, n), -generator.uniform(20, 90, n)
    labels = generator.random(n) < 0.5 if objective == "kto" else None
    direction = np.ones(n)
    if labels is not None:
        direction = np.where(labels, 1.0, -1.0)
    moved = {-1: chosen}
    others = {-1: rejected}
    losses = {-1: np.full(n, 0.69)}
    for adapter in range(len(FAMILIES)):
        moved[adapter] = chosen + direction * generator.normal(shift + adapter, 1, n)
        others[adapter] = rejected
        losses[adapter] = generator.uniform(0.4, 0.5, n) + 0.1 * adapter
    no_reference = objective == "orpo"
    heldout = HeldOutPreferences(
        objective=objective,
        beta=beta,
        chosen=moved,
        rejected={} if objective == "kto" else others,
        reference_chosen={} if no_reference else dict.fromkeys(moved, chosen),
        reference_rejected={} if no_reference or objective == "kto" else dict.fromkeys(moved, rejected),
        losses=losses,
        chosen_tokens=np.full(n, 20),
        rejected_tokens=np.full(n, 20),
        labels=labels,
    )
    names = {-1: ContenderNames("base", "base")}
    for adapter, family in enumerate(FAMILIES):
        names[adapter] = ContenderNames(f"{task}-{family}", family)
    return preference_result(task, heldout, names, samples=300, confidence=0.95, seed=0)


def content(shift: float = 2.0, beta: float = 0.1) -> dict[str, Any]:
    """report.json of a run with a task of each kind."""
    results = [
        invented("helpful", "dpo", 120, shift, beta=beta),
        invented("rated", "kto", 64, shift, beta=beta),
    ]
    losses: dict[str, dict[str, float | None]] = {}
    for task in ("helpful", "rated", "prose"):
        losses[task] = {"flora": 0.05, "lora": -0.05}
    report = run(losses, preferences=[result.model_dump(mode="json") for result in results])
    for result in report["results"]:
        result["objective"] = {"helpful": "dpo", "rated": "kto"}.get(result["task"], "sft")
    return report


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.model_validate(content())


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)).replace("\u00a0", " ")


def printed(print_to: Any) -> str:
    console = Console(record=True, width=80, file=io.StringIO())
    print_to(console)
    return console.export_text()


def test_the_page_shows_every_figure_with_its_pairs_and_says_what_it_is(report: Report) -> None:
    page = render_html(report)
    text = text_of(page)
    for result in report.preferences:
        for contender in result.contenders:
            assert f"{100 * (contender.reward_accuracy.value or 0):.1f}" in text
    assert "120 pairs" in text
    assert re.search(r"64 rows, \d+ desirable", text)
    assert "DPO, beta 0.1" in text
    assert "a tie counts one half" in text
    assert "Nothing was generated here" in text
    assert 'href="#preferences"' in page
    assert "helpful and rated learn a preference" in text


def test_a_run_without_preferences_does_not_mention_them() -> None:
    page = render_html(Report.model_validate(run({"prose": {"lora": -0.1}})))
    assert "preference" not in text_of(page).lower()


def test_names_are_escaped_on_the_page() -> None:
    changed = content()
    text = json.dumps(changed).replace("helpful", "<b>x</b>")
    page = render_html(Report.model_validate(json.loads(text)))
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page


def test_the_summary_compares_text_for_text_tasks_only(report: Report) -> None:
    text = " ".join(summarise(report)).replace("\u00a0", " ")
    assert "Of 2 adapters" in text
    assert re.search(
        r"Reward accuracy on held-out preferences: flora on helpful \d+\.\d % of 120 pairs", text
    )
    assert "lead over the next method is clear" in text
    assert "The best method is lora: prose" in text


def test_a_reward_accuracy_without_clear_difference_is_said_to_have_none() -> None:
    text = " ".join(summarise(Report.model_validate(content(shift=0.0))))
    assert "flora on helpful" in text
    assert "no clear difference to the base" in text


def test_the_terminal_fits_80_columns(report: Report) -> None:
    text = printed(lambda console: print_preferences(report.preferences, console))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"helpful +base +120 +0\.500 \[0\.500, 0\.500\]", text)
    assert re.search(r"rated +base +64 ", text)
    bits = printed(lambda console: print_results(report, console))
    assert bits.count("(best)") == 1  # of the task of text


def test_tables_have_the_figures_and_the_numbers_of_pairs(report: Report) -> None:
    scores = scores_of({"run": report})
    rows = list(csv.DictReader(io.StringIO(as_csv(scores))))
    accuracy = {row["method"]: row for row in rows if row["metric"] == "reward accuracy"}
    assert set(accuracy) == {"base", *FAMILIES}
    expected = report.preferences[0].by_family["lora"].reward_accuracy
    assert float(accuracy["lora"]["value"]) == expected.value
    assert accuracy["lora"]["examples"] == "120"
    assert accuracy["lora"]["clear"] == "True"
    assert {row["metric"] for row in rows if row["task"] == "rated"} >= {"reward sign accuracy", "reward gap"}
    assert "| helpful (120 pairs) |" in as_markdown(scores)
    assert "helpful (120 pairs) &" in as_latex(scores)


def test_runs_are_compared_by_accuracy_whatever_their_beta() -> None:
    report = Report.model_validate(content(shift=0.1))
    other = Report.model_validate(content(shift=9.0, beta=0.3))
    measures = {measure.title: measure for measure in comparison.measures([report, other])}
    (accuracy,) = [title for title in measures if title.startswith("Reward accuracy")]
    rows = {row.what: row for row in measures[accuracy].rows}
    row = rows["helpful", "flora"]
    assert row.note == ""
    best = [cell is not None and cell.best for cell in row.cells]
    assert best == [False, True]
    margins = measures["Reward margin on held-out preferences"]
    assert {row.note for row in margins.rows} == {"with another objective or beta"}
    assert "Reward accuracy on held-out preferences" in render_comparison({"a": report, "b": other})


def test_trackers_and_cards_have_the_figures(report: Report) -> None:
    metrics = final_metrics(report)
    expected = report.preferences[0].by_family["flora"]
    assert metrics["final/helpful/flora/reward_accuracy"] == expected.reward_accuracy.value
    assert metrics["final/helpful/flora/preference_loss"] == expected.loss.value
    assert metrics["final/rated/base/reward_margin"] == 0
    (table,) = [table for table in tables(report, "helpful-flora") if table.title == "Held-out preferences"]
    assert "120 pairs, DPO, beta 0.1" in table.note
    assert table.rows[table.adapter_row][0] == "flora"
    of_card = {metric.metric: metric for metric in card_results(report, "helpful-flora")}
    assert of_card["reward_accuracy"].value == expected.reward_accuracy.value
    assert of_card["reward_accuracy"].note == "120 pairs, DPO, beta 0.1"


def test_families_of_one_method_are_joined_here_too() -> None:
    changed = content()
    for part in ("adapters", "results", "preferences"):
        for item in changed[part]:
            if item["task"] != "rated":
                continue
            for row in [item, *item.get("contenders", []), *item.get("differences", [])]:
                for key in ("family", "first", "second"):
                    if row.get(key) == "flora":
                        row[key] = "flora_rated"
            if item.get("completions"):
                item["completions"]["flora_rated"] = item["completions"].pop("flora")
    for item in changed["completions"]:
        if item["task"] == "rated":
            item["completions"]["flora_rated"] = item["completions"].pop("flora")
    for part in ("adapters",):
        changed[part] = [row for row in changed[part] if row["family"] != "lora"]
    for part in ("results", "preferences"):
        for item in changed[part]:
            item["contenders"] = [row for row in item["contenders"] if row["family"] != "lora"]
            item["differences"] = [
                row for row in item["differences"] if "lora" not in (row["first"], row["second"])
            ]
    text = text_of(render_html(Report.model_validate(changed)))
    assert "flora_rated as" in text


def test_a_sweep_of_a_preference_task_is_won_by_the_loss_of_its_objective(report: Report) -> None:
    changed = content()
    losses = {"flora": 0.45, "lora": 0.55}
    members = [
        {
            "family": family,
            "settings": {"lr": 0.001 * (i + 1)},
            "bits_per_byte": 2.05 - 0.1 * i,
            "preference_loss": losses[family],
        }
        for i, family in enumerate(FAMILIES)
    ]
    changed["sweeps"] = [
        {"sweep": "x", "task": "helpful", "objective": "dpo", "winner": "flora", "members": members}
    ]
    swept = Report.model_validate(changed)
    assert winner_is_clear(swept.sweeps[0], swept)
    assert sweep_plots(swept) == {}
    text = text_of(render_html(swept))
    assert "the mean loss of the objective on held-out examples" in text
    assert re.search(r"best\s+0\.450", text)


def test_rows_with_other_labels_are_other_examples() -> None:
    split = random_preferences(1, 6, "kto")
    changed = replace(split, labels=~split.labels)
    assert examples_hash(split) == examples_hash(random_preferences(1, 6, "kto"))
    assert examples_hash(split) != examples_hash(changed)


@pytest.mark.parametrize(
    ("key", "value"), [("task", "unknown"), ("objective", "ppo"), ("examples", -1), ("contenders", [])]
)
def test_damaged_preferences_are_refused(key: str, value: object) -> None:
    changed = content()
    changed["preferences"][0][key] = value
    with pytest.raises(ValueError, match=key if key != "task" else "unknown"):
        Report.model_validate(changed)
