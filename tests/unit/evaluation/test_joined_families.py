"""Families of one method on different tasks are one column of a report."""

from __future__ import annotations

import pytest

from flora_train.evaluation.joined_families import joined_families
from flora_train.evaluation.report.html import render_html
from flora_train.evaluation.report.joined_report import note_on_joined_families, with_joined_families
from flora_train.evaluation.report.types import Report
from tests.unit.evaluation.report.test_html import run

ALIKE = ("flora", 0.01)


@pytest.mark.parametrize(
    ("adapters", "joined"),
    [
        (
            [("flora", "d", ALIKE), ("flora_rank4", "lua", ALIKE), ("lora", "d", "lora")],
            {"flora": "flora", "flora_rank4": "flora"},
        ),
        ([("flora", "d", ALIKE), ("flora_rank4", "d", ALIKE)], {}),
        ([("flora", "d", ALIKE), ("flora_rank4", "lua", "another learning rate")], {}),
        ([("flora", "d", ALIKE), ("other", "lua", ALIKE)], {}),
        ([("flora", "d", ALIKE), ("flora", "lua", ALIKE)], {}),
        (
            [("flora", "d", ALIKE), ("flora_a", "lua", ALIKE), ("flora_b", "lua", ALIKE)],
            {},
        ),
        ([], {}),
    ],
    ids=["disjoint", "same task", "other settings", "other name", "one family", "three on two tasks", "none"],
)
def test_joined_families_are_alike_and_never_on_the_same_task(
    adapters: list[tuple[str, str, object]], joined: dict[str, str]
) -> None:
    assert joined_families(adapters) == joined


def test_report_shows_both_ranks_in_one_column_and_says_so() -> None:
    content = run({"d": {"flora": -0.2, "lora": -0.1}, "lua": {"flora_rank4": -0.3, "lora": -0.1}})
    for adapter in content["adapters"]:
        adapter |= {"method": adapter["family"].partition("_")[0], "variant": None}
    report = Report.model_validate(content)
    shown = with_joined_families(report)
    assert shown.families == ["flora", "lora"]
    assert [adapter.name for adapter in shown.adapters] == [adapter.name for adapter in report.adapters]
    (in_lua,) = [result for result in shown.results if result.task == "lua"]
    assert in_lua.by_family["flora"].name == "lua-flora_rank4"
    note = note_on_joined_families(report)
    assert note is not None
    assert "flora_rank4 as flora" in note
    page = render_html(report)
    assert page.count('scope="col">flora</th>') >= 1
    assert 'scope="col">flora_rank4</th>' not in page
    assert note in page


def test_report_of_families_that_share_tasks_is_shown_as_it_is() -> None:
    report = Report.model_validate(run({"d": {"flora": -0.2, "flora_rank4": -0.1}}))
    assert with_joined_families(report) is report
    assert note_on_joined_families(report) is None
