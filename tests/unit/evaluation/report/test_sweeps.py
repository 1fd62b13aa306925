"""Sweeps in the report: plots of loss against each swept key, and winners whose lead is clear or not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from flora_train.config.adapter_schema import AdapterConfig
from flora_train.evaluation.report.html import render_html
from flora_train.evaluation.report.plots import LONGEST_LABEL, shortened
from flora_train.evaluation.report.sweeps import sweep_plots, swept_settings, winner_is_clear
from flora_train.evaluation.report.types import Report
from tests.unit.evaluation.report.test_html import THREE, Outline, page_of, run


def sweep_run(losses: dict[str, dict[str, float | None]], settings: dict[str, dict[str, Any]]) -> Report:
    """A report with one sweep, x, on every task. losses: task -> family -> difference to the base; settings:
    of a family."""
    content = run(losses)
    for task, families in losses.items():
        members = []
        for family, values in settings.items():
            difference = families[family]
            bits = None if difference is None else 2.0 + difference
            members.append({"family": family, "settings": values, "bits_per_byte": bits})
        measured = {
            member["family"]: member["bits_per_byte"]
            for member in members
            if member["bits_per_byte"] is not None
        }
        winner = min(measured, key=measured.__getitem__, default=None)
        content["sweeps"].append({"sweep": "x", "task": task, "winner": winner, "members": members})
    return Report.model_validate(content)


GRID = {
    "x_lr1e-3_rank4": {"lr": 1e-3, "rank": 4},
    "x_lr1e-2_rank4": {"lr": 1e-2, "rank": 4},
    "x_lr1e-3_rank8": {"lr": 1e-3, "rank": 8},
    "x_lr1e-2_rank8": {"lr": 1e-2, "rank": 8},
}
LOSSES: dict[str, float | None] = {
    "x_lr1e-3_rank4": -0.1,
    "x_lr1e-2_rank4": -0.2,
    "x_lr1e-3_rank8": -0.15,
    "x_lr1e-2_rank8": None,
}


def test_a_sweep_of_two_keys_has_a_plot_for_each_key_with_a_line_for_each_value_of_the_other() -> None:
    plots = sweep_plots(sweep_run({"lua": LOSSES}, GRID))
    lines = {key: [series.label for series in plot.series] for key, (plot,) in plots.items()}
    assert lines == {
        "lr": ["x, rank 4", "x, rank 8"],
        "rank": ["x, learning rate 0.001", "x, learning rate 0.01"],
    }
    (plot,) = plots["lr"]
    first, second = plot.series[0].points
    assert (first.x, second.x) == (0.001, 0.01)
    assert first.loss == pytest.approx((1.9, 1.89, 1.91))
    assert plot.series[1].points[1].loss is None
    assert plot.base == 2.0


def test_the_page_draws_every_setting_of_a_sweep_once_for_each_task_and_key() -> None:
    page = render_html(sweep_run({"lua": LOSSES, "perl": LOSSES}, GRID))
    assert "Loss against learning rate" in page
    assert "Loss against rank" in page
    for task in ("lua", "perl"):
        assert page.count(f"Bits per byte against learning rate on {task}") == 1
        assert page.count(f"Bits per byte against rank on {task}") == 1
    assert "x, rank 8 at 0.01: not finite" in page
    assert "x, rank 4 at 0.001: 1.900 (1.890 to 1.910)" in page
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))


def test_without_swept_values_the_page_has_the_table_of_a_sweep_only() -> None:
    page = render_html(sweep_run({"lua": {"x_a": -0.1, "x_b": -0.2}}, {"x_a": {}, "x_b": {}}))
    assert 'id="sweeps"' in page
    assert "Loss against" not in page


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300, "cosine", "<b>"])
def test_values_of_any_kind_are_drawn_and_escaped(value: float | str) -> None:
    page = render_html(
        sweep_run({"lua": {"x_a": -0.1, "x_b": -0.2}}, {"x_a": {"key": value}, "x_b": {"key": 0.5}})
    )
    assert "Loss against key" in page
    assert (
        "<b>"
        not in re.sub(r"<b>[\w\s.,@]+</b>", "", page).partition('id="sweeps"')[2].partition("</section>")[0]
    )


def test_swept_keys_are_those_whose_values_differ_within_a_sweep() -> None:
    adapters = {
        "x_lr1": AdapterConfig(method="lora", lr=1e-3, rank=4, sweep="x"),
        "x_lr2": AdapterConfig(method="lora", lr=2e-3, rank=4, sweep="x"),
        "y": AdapterConfig(method="lora", lr=5e-3, rank=16),
    }
    assert swept_settings(adapters) == {"x_lr1": {"lr": 0.001}, "x_lr2": {"lr": 0.002}}


@pytest.mark.parametrize(("second", "clear"), [(-0.1, True), (-0.195, False), (None, True)])
def test_a_winner_is_best_only_where_its_lead_over_the_second_is_clear(
    second: float | None, clear: bool
) -> None:
    report = sweep_run({"lua": {"x_a": -0.2, "x_b": second}}, {"x_a": {}, "x_b": {}})
    assert winner_is_clear(report.sweeps[0], report) == clear
    table = render_html(report).partition('id="sweeps"')[2].partition("</section>")[0]
    assert ("best, lead unclear" in table) != clear


def test_wide_tables_can_be_scrolled_with_the_keyboard_and_say_so() -> None:
    page = page_of(run(THREE))
    assert page.count("scroll sideways") == len(
        re.findall(r'class="(?:heat )?scroll" role="region" tabindex="0"', page)
    )
    assert ".scroll.more .hint" in page


def test_many_methods_are_rows_and_every_cell_names_its_column_for_narrow_screens() -> None:
    families = {f"a-method-with-a-rather-long-name-{i}": -0.01 * i for i in range(26)}
    page = page_of(run({"lua": families, "perl": families}))
    table = page.partition('id="table-results"')[2].partition("</table>")[0]
    assert table.count('<th scope="row">') == 26 + 4
    cells = re.findall(r"<td[^>]*>", table)
    assert len(cells) == 2 * (26 + 4)
    assert all('data-label="lua"' in cell or 'data-label="perl"' in cell for cell in cells)
    panel = page.partition("Difference to the base model on lua")[2].partition("</svg>")[0]
    assert all(f">{family}<" in panel for family in families)


def test_names_of_a_sweep_that_are_too_long_stay_different() -> None:
    names = [f"{'a' * 60}_lr{i}e-3" for i in range(9)]
    labels = {shortened(name, LONGEST_LABEL) for name in names}
    assert len(labels) == len(names)
    assert max(map(len, labels)) == LONGEST_LABEL


def test_adapters_that_plain_peft_does_not_load_are_named() -> None:
    assert "NOT_FOR_PLAIN_PEFT" not in page_of(run(THREE))
    results = run(THREE)
    results["facts"]["not_for_plain_peft"] = {"lua-flora": "PEFT has no <fLoRA>."}
    page = page_of(results)
    assert "does not load the exported folder of lua-flora" in page
    assert "PEFT has no &lt;fLoRA&gt;." in page


def test_a_map_of_many_methods_has_methods_as_rows() -> None:
    families = {f"method{i}": -0.01 * i for i in range(26)}
    page = page_of(run({"lua": families, "perl": families}))
    table = page.partition('id="gains"')[2].partition("</table>")[0]
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["method", "lua", "perl"]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == list(families)
