"""The parts of a report that cover all tasks: heatmaps, shares over time and the search field."""

from __future__ import annotations

import re

from tests.unit.evaluation.report.test_html import THREE, page_of, run


def test_shares_over_time_name_the_tasks_that_end_farthest_from_their_aim() -> None:
    results = run({name: {"flora": -0.1} for name in ("lua", "perl", "ruby")})
    for task, target in zip(results["tasks"], (0.5, 0.25, 0.25), strict=True):
        task["target_share"] = target
    assert "as a multiple of the target" not in page_of(results)
    results["curves"]["drawn"] = {
        "lua": [[5, 50], [10, 60]],
        "perl": [[5, 0], [10, 20]],
        "ruby": [[5, 0], [10, 20]],
    }
    page = page_of(results)
    assert "At the end perl has 0.80 and lua 1.20 times its share." in page


def test_gains_are_a_map_where_there_are_several_tasks() -> None:
    page = page_of(run(THREE))
    (rows,) = re.findall(r'<div class="heat scroll".*?<tbody>(.*?)</tbody>', page, re.S)
    cells = re.findall(r'<td data-label="[^"]*" class="(\w+)" style="--strength:(\d+)">([^<]*)', rows)
    assert {kind for kind, _, _ in cells} <= {"better", "worse", "unclear"}
    clear = [(kind, float(text.replace("−", "-"))) for kind, _, text in cells if kind != "unclear"]
    assert {kind for kind, _ in clear} == {"better", "worse"}
    assert all((value < 0) == (kind == "better") for kind, value in clear)
    assert max(int(strength) for _, strength, _ in cells) == 100
    assert '<div class="heat' not in page_of(run({"lua": {"flora": -0.2}}))
    assert 'id="find"' not in page
    many = {f"task{i}": {"flora": -0.1, "lora": 0.1} for i in range(40)}
    page = page_of(run(many))
    assert '<div class="heat many">' in page
    assert 'id="find"' in page
