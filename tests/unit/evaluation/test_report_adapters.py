"""What the report says of adapters that went wrong, left early, or competed in a sweep."""

from __future__ import annotations

from flora_train.evaluation.report.html import render_html
from tests.unit.evaluation.test_report_html import THREE, run


def test_skipped_steps_stand_out() -> None:
    results = run(THREE)
    results["adapters"][0]["skipped_steps"] = 3
    assert '<td class="loud">3</td>' in render_html(results)


def test_who_stopped_early_is_told() -> None:
    results = run(THREE)
    assert "left at" not in render_html(results)
    assert "rolled back" not in render_html(results)
    results["adapters"][1]["left"] = {"step": 40, "why": "patience"}
    results["adapters"][2] |= {"quarantined": {"step": 5, "why": "its loss is not finite"}, "rollbacks": 3}
    page = render_html(results)
    assert page.count("<td>20, left at 40 (no better for as long as its patience)</td>") == 1
    assert page.count('<td>20, <b class="loud">quarantined at 5</b>: its loss is not finite</td>') == 1
    assert page.count("quarantined at step 5") == 1  # what a screen reader hears of the curve
    assert "A cross: the adapter was quarantined." in page
    assert page.count('<td class="loud">3</td>') == 1
    assert "Rolled back: it went wrong" in page
    assert "Quarantined: it went back" in page


def test_a_sweep_shows_every_setting_and_its_winner() -> None:
    results = run(THREE)
    assert "Sweeps" not in render_html(results)
    members = [
        {"family": "lora_lr1e-3", "bits_per_byte": 1.2, "left": None},
        {"family": "lora_lr2e-3", "bits_per_byte": 1.3, "left": {"step": 25, "why": "halving"}},
        {"family": "lora_lr4e-3", "bits_per_byte": None, "left": None},
    ]
    results["sweeps"] = [{"sweep": "lora", "task": task, "winner": "lora_lr1e-3", "members": members} for task in ("lua", "perl")]
    page = render_html(results)
    assert page.count("<b>1.200</b>") == 2
    assert page.count("left at 25") == 2
    assert '<a href="#sweeps">' in page
