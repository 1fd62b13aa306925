"""Numbers in words: no more digits than the interval supports, and no verdict that it does not allow."""

from __future__ import annotations

from flora_train.evaluation.report.formatting import count, interval, listed, number, shared_digits, verdict
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import Interval
from tests.unit.evaluation.report.test_html import estimate, run


def interval_of(value: float | None) -> Interval:
    return Interval.model_validate(estimate(value))


def test_numbers_have_no_false_precision() -> None:
    assert [number(v) for v in (1.23456, 123.456, 12345.6, None, float("nan"))] == [
        "1.235",
        "123",
        "12,346",
        "not finite",
        "not finite",
    ]
    assert number(-0.0001, 3, "+") == "0.000"
    assert interval(interval_of(-0.04), 3) == "−0.050 to −0.030"
    assert (count(1234567), count(None)) == ("1,234,567", "–")
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"


def test_decimals_follow_the_typical_interval() -> None:
    for half, digits in ((0.3, 2), (0.012, 3), (0.0018, 4), (1e-9, 5)):
        results = run({"lua": {"flora": -0.2}})
        results["results"][0]["contenders"][0]["difference_to_base"] = estimate(-0.2, half)
        assert shared_digits(Report.model_validate(results).results) == digits


def test_verdict_needs_an_interval_that_excludes_zero() -> None:
    assert [verdict(interval_of(v)) for v in (-0.2, 0.2, 0.001, None)] == [
        "better",
        "worse",
        "unclear",
        "not finite",
    ]
