"""Adapters that failed, stopped early or were part of a sweep, in the report."""

from __future__ import annotations

from tests.unit.evaluation.report.test_html import THREE, page_of, run


def test_skipped_steps_stand_out() -> None:
    results = run(THREE)
    results["adapters"][0]["skipped_steps"] = 3
    assert '<td class="loud">3</td>' in page_of(results)


def test_adapters_that_stopped_early_are_shown() -> None:
    results = run(THREE)
    assert "stopped at" not in page_of(results)
    assert "rolled back" not in page_of(results)
    results["adapters"][1]["retired"] = {"step": 40, "reason": "patience"}
    results["adapters"][2] |= {"quarantined": {"step": 5, "reason": "its loss is not finite"}, "rollbacks": 3}
    page = page_of(results)
    assert page.count("<td>20, stopped at 40 (patience ran out)</td>") == 1
    assert page.count('<td>20, <b class="alarm">quarantined at 5</b>: its loss is not finite</td>') == 1
    assert page.count("quarantined at step 5") == 1  # what a screen reader hears of the curve
    assert "A cross: the adapter was quarantined." in page
    assert page.count('<td class="loud">3</td>') == 1
    assert "Rolled back: the adapter was reset" in page
    assert "Quarantined: the adapter was reset and trained no more." in page


def test_a_sweep_shows_every_setting_and_its_winner() -> None:
    results = run(THREE)
    assert "Sweeps" not in page_of(results)
    members = [
        {"family": "lora_lr1e-3", "bits_per_byte": 1.2, "retired": None},
        {"family": "lora_lr2e-3", "bits_per_byte": 1.3, "retired": {"step": 25, "reason": "halving"}},
        {"family": "lora_lr4e-3", "bits_per_byte": None, "retired": None},
    ]
    results["sweeps"] = [
        {"sweep": "lora", "task": task, "winner": "lora_lr1e-3", "members": members}
        for task in ("lua", "perl")
    ]
    page = page_of(results)
    assert page.count("best, lead unclear</span> 1.200</span></td>") == 2
    assert page.count("stopped at 25") == 2
    assert '<a href="#sweeps">' in page
