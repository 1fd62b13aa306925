"""Files of published results: the paper's figures, every form of a figure, errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.report.published import PublishedResults, load_published, read_published

IMPROVEMENTS = {
    "bigcode/starcoder": {
        "d": (22.14, 7.99, 21.37),
        "pl": (25.76, 3.90, None),
        "rb": (1692.86, 1394.64, 1608.04),
        "rs": (17.14, 5.04, 19.95),
        "rkt": (21.61, 12.96, 22.58),
        "swift": (20.51, 7.19, 20.36),
        "jl": (13.92, 2.51, None),
        "lua": (13.57, 6.77, 9.18),
        "r": (9.24, 3.59, 15.8),
    },
    "bigcode/starcoderbase-3b": {
        "d": (1.20, 1.20, 23.34),
        "pl": (21.25, 6.83, None),
        "rb": (171.68, 47.90, 160.68),
        "rs": (22.24, 0.60, 20.31),
        "rkt": (13.99, 4.48, 9.48),
        "swift": (56.21, 24.83, 49.76),
        "jl": (22.39, 7.05, 26.59),
        "lua": (10.39, 2.33, 14.75),
        "r": (7.02, -0.25, 0.62),
    },
}
"""Relative improvements over the base in percent that tables 1 and 3 of the paper print: fLoRA, IA3, LoRA.
None: the three that do not follow from the figures in the same cell."""


@pytest.mark.parametrize("model", IMPROVEMENTS)
def test_figures_of_the_paper_give_the_improvements_that_it_prints(model: str) -> None:
    """Rounding of base and method to two decimals is allowed for."""
    (table,) = [table for table in load_published("paper").tables if table.setup.model == model]
    assert table.results.keys() == IMPROVEMENTS[model].keys()
    for language, improvements in IMPROVEMENTS[model].items():
        row = {method: cell.mean for method, cell in table.results[language].items() if cell is not None}
        for method, printed in zip(("flora", "ia3", "lora"), improvements, strict=True):
            if printed is not None:
                improvement = 100 * (row[method] / row["base"] - 1)
                rounding = 0.5 / row["base"] * (1 + row[method] / row["base"]) + 0.006
                assert improvement == pytest.approx(printed, abs=rounding), (language, method)


def test_error_rates_of_the_paper_have_deviations_and_the_base_has_none() -> None:
    (table,) = [table for table in load_published("paper").tables if table.metric == "wer"]
    assert table.methods == ["base", "flora", "ia3", "lora"]
    assert [table.rank(language) for language in table.results] == [1, 1, 1, 4, 1, 1]
    for row in table.results.values():
        for method, cell in row.items():
            assert cell is not None
            assert (cell.deviation is None) == (method == "base")


def read(text: str, folder: Path) -> PublishedResults:
    path = folder / "results.yaml"
    path.write_text(text, encoding="utf-8")
    return read_published(path)


def with_results(results: str, more: str = "") -> str:
    return f"source: s\ntables: [{{title: t, metric: pass@1, results: {results}{more}}}]"


def test_a_figure_is_a_number_or_a_text_with_its_deviation_or_a_dash(tmp_path: Path) -> None:
    cells = '{base: 12, flora: 30.21 ± 0.25, lora: "3.5 +- 1", ia3: "-", dora: null, x: "7"}'
    row = read(with_results(f"{{lua: {cells}}}"), tmp_path).tables[0].results["lua"]
    figures = {method: cell and (cell.mean, cell.deviation) for method, cell in row.items()}
    assert figures == {
        "base": (12, None),
        "flora": (30.21, 0.25),
        "lora": (3.5, 1),
        "ia3": None,
        "dora": None,
        "x": (7, None),
    }


@pytest.mark.parametrize(("unit", "given"), [("percent", 17.26), ("fraction", 0.1726)])
def test_both_units_give_the_same_fraction(unit: str, given: float, tmp_path: Path) -> None:
    (table,) = read(with_results(f"{{Perl: {{base: {given}}}}}", f", unit: {unit}"), tmp_path).tables
    cell = table.fraction("pl", "base")
    assert cell is not None
    assert cell.mean == 0.1726


@pytest.mark.parametrize(
    ("metric", "unit", "given", "doubt"),
    [
        ("pass@1", "percent", (0.3, 0.41), "unit: fraction"),
        ("pass@1", "percent", (0.3, 4.1), None),
        ("pass@1", "percent", (0, 0), None),
        ("wer", "fraction", (0.3, 4.1), None),
        ("wer", "fraction", (30, 41), "unit: percent"),
    ],
)
def test_figures_that_look_like_the_other_unit_are_doubted(
    metric: str, unit: str, given: tuple[float, float], doubt: str | None, tmp_path: Path
) -> None:
    results = f"{{lua: {{base: {given[0]}, flora: {given[1]}}}}}"
    text = with_results(results, f", unit: {unit}").replace("pass@1", metric)
    (table,) = read(text, tmp_path).tables
    assert [sentence.rpartition("write ")[2].rstrip(".") for sentence in table.doubts] == [
        *filter(None, [doubt])
    ]


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("a: 1", "source", "is required"),
        ("source: s\ntables: []", "tables", "at least 1 item"),
        ("source: s\ntables: 3", "tables = 3", "must be a list"),
        ("source: s\ntables: [3]", "tables.0", "must hold keys and values"),
        ("[]", "results.yaml", "must hold keys and values"),
        ("source: [", "results.yaml:", "YAML"),
        (with_results("{}"), "tables.0.results", "at least 1 item"),
        (with_results("{lua: {}}"), "tables.0.results", "a figure of at least one method"),
        (with_results("{lua: 3}"), "tables.0.results.lua = 3", "must hold keys and values"),
        (
            with_results("{lua: {base: yes}}"),
            "tables.0.results.lua.base = True",
            "must be a number, or a mean",
        ),
        (with_results("{lua: {base: 3 or 4}}"), "tables.0.results.lua.base = '3 or 4'", "30.21 ± 0.25"),
        (with_results("{lua: {base: -3}}"), "tables.0.results.lua.base = -3", "must be at least 0"),
        (with_results("{lua: {base: .inf}}"), "tables.0.results.lua.base = inf", "finite number"),
        (with_results("{lua: {base: 117}}"), "tables.0.results", "pass@1 is at most 100"),
        (with_results("{lua: {base: 17}}", ", unit: fraction"), "tables.0.results", "at most 1"),
        (with_results("{perl: {base: 1}, pl: {base: 2}}"), "tables.0.results", "has pl twice"),
        (with_results("{lua: {base: 1}}", ", setpu: {}"), "tables.0.setpu", "Did you mean 'setup'?"),
        (
            with_results("{lua: {base: 1}}", ", setup: {modl: a}"),
            "tables.0.setup.modl",
            "Did you mean 'model'?",
        ),
        (
            with_results("{lua: {base: 1}}", ", setup: {steps: -1}"),
            "tables.0.setup.steps = -1",
            "more than 0",
        ),
        (
            with_results("{lua: {base: 1}}").replace("pass@1", "bleu"),
            "0.metric = 'bleu'",
            "pass@K, wer",
        ),
    ],
)
def test_wrong_input_gives_an_error_that_names_file_key_and_remedy(
    text: str, key: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        read(text, tmp_path)
    first = str(raised.value).splitlines()[0]
    assert "results.yaml" in first
    assert key in first
    assert hint in first


@pytest.mark.parametrize(("name", "hint"), [("papr", "Did you mean 'paper'?"), ("/tmp", "is a folder")])
def test_what_is_no_file_gives_an_error(name: str, hint: str) -> None:
    with pytest.raises(UserError, match="beside = ") as raised:
        load_published(name)
    assert hint in str(raised.value)
