"""Published tables beside a run: which figures stand side by side, what differs, and runs without any."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flora_train.config.errors import UserError
from flora_train.evaluation.report.html import render_html
from flora_train.evaluation.report.published import PublishedResults, load_published
from flora_train.evaluation.report.published_rows import ComparedRow, ComparedTable, beside_published
from flora_train.evaluation.report.published_tables import as_csv, as_latex, as_markdown
from flora_train.evaluation.report.terminal import print_published
from flora_train.evaluation.report.types import Report
from tests.unit.evaluation.report.test_html import Outline

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"
Content = dict[str, Any]


def content_of(name: str) -> Content:
    content: Content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def compared(content: Content, published: PublishedResults | None = None) -> list[ComparedTable]:
    report = Report.model_validate(content)
    return beside_published(report, published or load_published("paper"), run="outputs/run", name="paper")


def published(results: Content, metric: str = "pass@1", **changes: Any) -> PublishedResults:
    table = {"title": "Other", "metric": metric, "results": results, **changes}
    return PublishedResults.model_validate({"source": "Others, 2020", "tables": [table]})


def rows_of(table: ComparedTable) -> dict[tuple[str, str], ComparedRow]:
    return {(row.language, row.family): row for row in table.rows}


def with_config(content: Content, **changes: Any) -> Content:
    """The run with other values of dotted configuration keys."""
    config = yaml.safe_load(content["facts"]["config"])
    for key, value in changes.items():
        section = config
        *parents, last = key.split("__")
        for parent in parents:
            section = section[parent]
        section[last] = value
    return {**content, "facts": {**content["facts"], "config": yaml.safe_dump(config)}}


def test_programs_stand_beside_the_paper_with_the_reports_own_figures() -> None:
    content = content_of("multipl_e_local")
    (table,) = compared(content)
    (suite,) = [suite for suite in Report.model_validate(content).code if suite.suite == "multipl_e"]
    rows = rows_of(table)
    assert table.title == "Tables 1 and 3, StarCoder 15B"
    for part in suite.languages:
        for score in part.contenders:
            row = rows[part.name, score.family]
            assert row.value == score.pass_at[1]
            if score.family != "base":
                assert row.difference == part.to_base[score.family][1]
    lua = rows["Lua", "flora"]
    assert lua.published is not None
    assert (lua.published.mean, lua.published_difference) == (0.302, 0.036)


def test_languages_that_only_one_side_has_are_shown_without_a_figure() -> None:
    (table,) = compared(content_of("multipl_e_local"))
    rows = rows_of(table)
    assert rows["Swift", "flora"].value is None
    assert rows["Swift", "flora"].published is not None
    assert rows["PHP", "flora"].published is None
    assert rows["PHP", "flora"].value is not None
    assert list(table.by_language) == [
        "D",
        "Perl",
        "Ruby",
        "Rust",
        "Racket",
        "Swift",
        "Julia",
        "Lua",
        "R",
        "PHP",
    ]


def test_a_long_table_with_figures_of_the_other_unit_is_drawn_and_says_so() -> None:
    results: Content = {f"l{number}": {"base": 0.1, "flora": 0.2} for number in range(2000)}
    (table,) = compared(content_of("multipl_e_local"), published({"lua": {"base": 0.3}, **results}))
    assert len(table.by_language) >= 2001
    assert any("unit: fraction" in note for note in table.notes)


def test_error_rates_are_those_of_text_as_it_is_written() -> None:
    content = content_of("speech_local")
    (table,) = compared(content)
    speech = Report.model_validate(content).speech
    assert speech is not None
    czech = {part.task: part for part in speech.languages}["cs"]
    rows = rows_of(table)
    for family in ("base", "flora", "lora", "ia3"):
        assert rows["Czech", family].value == czech.by_family[family].wer
        assert rows["Czech", family].value != czech.by_family[family].wer_normalized
    assert rows["Czech", "lora"].difference == czech.to_base["lora"].wer
    assert table.lower_is_better


def test_everything_that_differs_from_the_papers_setup_is_named() -> None:
    (table,) = compared(content_of("multipl_e_local"))
    assert table.setup.startswith("Not a replication of the published results. In this run: ")
    for difference in (
        "model assets/models/smollm2-135m instead of bigcode/starcoder",
        "an unknown number of parameters instead of 15.5 billion",
        "quantization none instead of 8bit",
        "instead of The Stack",
        "20 steps instead of 1,500",
        "1.3 examples per step and adapter instead of 8",
        "variant residual of flora instead of pure",
        "rank 4 of flora instead of 1",
        "learning rate 0.02 of flora instead of 0.008",
        "3 samples per problem instead of 100",
        "temperature 0.2 instead of 0.1",
    ):
        assert difference in table.setup


def like_the_paper() -> Content:
    """The run as if it had been made as the paper's."""
    content = with_config(
        content_of("multipl_e_local"),
        training__steps=1500,
        model__quantization="8bit",
        model__path="bigcode/starcoder",
    )
    config = yaml.safe_load(content["facts"]["config"])
    for task in config["tasks"].values():
        task["train"] = {"hub": "bigcode/the-stack-dedup"}
    content["facts"] |= {
        "config": yaml.safe_dump(config),
        "model": "bigcode/starcoder",
        "base_parameters": 15_517_456_384,
    }
    for task in content["tasks"]:
        task["epochs"] = 8 * 1500 / task["train"]["examples"]
    rates = {"flora": 8e-3, "ia3": 5e-3, "lora": 1e-4}
    for adapter in content["adapters"]:
        adapter |= {"lr": rates[adapter["method"]]}
        if adapter["method"] != "ia3":
            adapter |= {"rank": 4 if adapter["task"] == "lua" else 1}
        if adapter["variant"]:
            adapter |= {"variant": "pure"}
    for suite in content["code"]:
        suite |= {"temperature": 0.1}
        for part in suite["languages"]:
            for score in part["contenders"]:
                score |= {"samples": 100}
    return content


def test_a_run_of_the_papers_setup_is_not_said_to_differ() -> None:
    (table,) = compared(like_the_paper())
    assert table.differs == []
    assert table.setup == "No recorded setting of this run differs from the published set-up."


def test_a_tiny_model_of_the_papers_name_is_no_replication() -> None:
    content = like_the_paper()
    content["facts"]["base_parameters"] = 820_000
    (table,) = compared(content)
    assert table.differs == ["820 thousand parameters instead of 15.5 billion"]


def test_steps_with_other_numbers_of_examples_are_no_replication() -> None:
    content = like_the_paper()
    for task in content["tasks"]:
        task["epochs"] *= 9
    (table,) = compared(content)
    assert table.differs == ["72 examples per step and adapter instead of 8"]


def test_a_part_of_the_problems_is_no_replication() -> None:
    content = like_the_paper()
    for part in content["code"][0]["languages"]:
        part |= {"problems": 5, "available": 5}
    (table,) = compared(content)
    assert table.differs == ["5 of 161 problems in Lua, Perl and Ruby"]


def test_the_table_of_the_runs_own_model_is_chosen() -> None:
    content = content_of("multipl_e_local")
    content["facts"]["model"] = "models/starcoderbase-3b"
    (table,) = compared(content)
    assert table.title == "Tables 1 and 3, StarCoderBase 3B"


def two_ranks(content: Content) -> Content:
    """The run as if its LoRA were a fLoRA of rank 1, beside the fLoRA of rank 4."""
    text = json.dumps(content).replace('"lora"', '"flora_r1"')
    content = json.loads(text)
    for adapter in content["adapters"]:
        if adapter["family"] == "flora_r1":
            adapter |= {"method": "flora", "rank": 1, "variant": "pure"}
    return content


def test_of_several_ranks_the_published_one_of_the_language_is_shown() -> None:
    (table,) = compared(two_ranks(content_of("multipl_e_local")))
    rows = [row for row in table.rows if row.method == "flora" and row.value is not None]
    shown = {row.language: row.family for row in rows if row.published is not None}
    assert shown == {"Lua": "flora", "Perl": "flora_r1", "Ruby": "flora_r1"}
    assert "In the table only where their rank is the published one: flora and flora_r1." in table.notes


def test_all_ranks_are_shown_where_the_published_one_is_missing() -> None:
    content = two_ranks(content_of("multipl_e_local"))
    for adapter in content["adapters"]:
        if adapter["family"] == "flora_r1":
            adapter["rank"] = 16
    (table,) = compared(content)
    perl = [row.family for row in table.rows if row.language == "Perl" and row.method == "flora"]
    assert perl == ["flora", "flora_r1"]
    assert "rank 16 of flora instead of 1" in table.differs


@pytest.mark.parametrize(("losses", "winner"), [((1.2, 1.1), "flora_r1"), ((1.1, None), "flora")])
def test_of_a_sweep_the_setting_with_the_lowest_heldout_loss_is_shown(
    losses: tuple[float | None, ...], winner: str
) -> None:
    content = two_ranks(content_of("multipl_e_local"))
    for adapter in content["adapters"]:
        if adapter["method"] == "flora":
            adapter["rank"] = 1
    members = [
        {"family": family, "settings": {}, "bits_per_byte": loss, "retired": None}
        for family, loss in zip(("flora", "flora_r1"), losses, strict=True)
    ]
    content["sweeps"] = [{"sweep": "flora", "task": "perl", "winner": winner, "members": members}]
    (table,) = compared(content)
    shown = [row.family for row in table.by_language["Perl"] if row.method == "flora"]
    assert shown == [winner]
    assert [row.family for row in table.by_language["Ruby"] if row.method == "flora"] == ["flora", "flora_r1"]
    assert any("of a sweep" in note.lower() for note in table.notes)


def test_a_family_of_the_run_can_be_named_instead_of_a_method() -> None:
    content = two_ranks(content_of("multipl_e_local"))
    (table,) = compared(content, published({"perl": {"base": 3, "flora_r1": 4, "dora": 5}}))
    assert [(row.method, row.family, row.value is None) for row in table.by_language["Perl"]] == [
        ("base", "base", False),
        ("flora_r1", "flora_r1", False),
        ("dora", "dora", True),
    ]


def without_speech(content: Content) -> Content:
    return {**with_config(content), "speech": None}


def with_pass_at_10(content: Content) -> Content:
    text = json.dumps(content).replace('"1": {', '"10": {').replace('"pass_at_k": [1]', '"pass_at_k": [10]')
    return json.loads(re.sub(r'"pass_at_k": \[\s*1\s*\]', '"pass_at_k": [10]', text))


def without_toolchains(content: Content) -> Content:
    suite = content["code"][0]
    empty = {"languages": [], "contenders": [], "differences": []}
    missing = [{"language": "lua", "reason": "lua is not installed"}]
    return {**content, "code": [{**suite, "languages": [], "macro": empty, "not_evaluated": missing}]}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "quickstart",
            lambda run: run,
            "were executed on the starter problems only: flora-train solve",
        ),
        (
            "multipl_e_local",
            lambda run: {**run, "code": []},
            "were not executed: flora-train solve outputs",
        ),
        ("multipl_e_local", without_toolchains, "could not be evaluated here: lua: lua is not installed"),
        ("multipl_e_local", with_pass_at_10, "the run has no pass@1: flora-train solve outputs/run"),
        ("speech_local", without_speech, "only held-out losses in Czech: its tasks had no test split"),
        ("speech_sweep", lambda run: run, "the run has none of these languages"),
    ],
)
def test_a_run_without_figures_for_any_table_gets_one_error_that_says_why(
    name: str, change: Callable[[Content], Content], reason: str
) -> None:
    with pytest.raises(UserError) as raised:
        compared(change(content_of(name)))
    message = str(raised.value)
    assert message.startswith("beside = 'paper': has no table for this run: ")
    assert reason in message
    assert "\n" not in message


HOSTILE = "<script>alert(1)</script> a|b & 100% \u202e \x1b[31m"


def hostile() -> list[ComparedTable]:
    other = published(
        {"lua": {"base": 3, HOSTILE: 4}},
        title=HOSTILE,
        notes=[HOSTILE],
        names={"lua": HOSTILE},
        setup={"model": HOSTILE},
    )
    return compared(content_of("multipl_e_local"), other)


def test_texts_of_a_file_are_escaped_in_the_page() -> None:
    page = render_html(Report.model_validate(content_of("multipl_e_local")), hostile())
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    Outline(page)


def test_the_page_has_the_section_and_the_sentence_in_the_caption() -> None:
    report = Report.model_validate(content_of("multipl_e_local"))
    page = render_html(report, compared(content_of("multipl_e_local")))
    (caption,) = re.findall(r'<caption id="table-published-1">(.*?)</caption>', page, re.DOTALL)
    assert "Not a replication of the published results." in caption
    assert "20 steps instead of 1,500" in caption
    assert 'href="#published"' in page
    assert 'id="published"' not in render_html(report)


@pytest.mark.parametrize("name", ["multipl_e_local", "speech_local"])
def test_the_terminals_table_fits_into_80_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_published(compared(content_of(name)), Console(soft_wrap=True, width=80))
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "published" in line and "to base" in line)
    table = [line for line in lines[first:] if not line.startswith("note: ")]
    assert len(table) > 20
    assert max(map(len, table)) <= 80


def test_control_characters_of_a_file_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_published(hostile(), Console(soft_wrap=True, width=80))
    output = capsys.readouterr().out
    assert "\x1b[31m" not in output
    assert "\u202e" not in output


def test_csv_has_the_numbers_of_the_report_and_what_differs() -> None:
    tables = compared(content_of("speech_local"))
    rows = list(csv.DictReader(io.StringIO(as_csv(tables))))
    assert len(rows) == len(tables[0].rows)
    for line, row in zip(rows, tables[0].rows, strict=True):
        assert (line["language"], line["family"]) == (row.language, row.family)
        assert (line["published"] == "") == (row.published is None)
        if row.difference is not None:
            assert float(line["difference_low"]) == row.difference.low
        assert line["setup"].startswith("Not a replication")


def test_markdown_and_latex_have_a_row_for_each_method_and_what_differs() -> None:
    tables = [*compared(content_of("multipl_e_local")), *hostile()]
    rows = sum(len(table.rows) for table in tables)
    markdown = as_markdown(tables)
    assert len(re.findall(r"^\| .* \|$", markdown, re.MULTILINE)) == rows + 2 * len(tables)
    assert all(
        line.count("|") - line.count("\\|") == 7 for line in markdown.splitlines() if line.startswith("|")
    )
    latex = as_latex(tables)
    assert latex.count(r" \\") == rows + len(tables)
    assert r"a|b \& 100\%" in latex
    for text in (markdown, latex):
        assert text.count("Not a replication of the published results.") == len(tables)
