"""Means over languages are of the same languages for everybody who is shown."""

from __future__ import annotations

from flora_train.evaluation.code.summary import _widest


def test_the_mean_is_over_the_languages_that_most_families_share() -> None:
    seven, two = frozenset("abcdefg"), frozenset("hi")
    families = {"base": seven | two, "flora": seven, "flora_rank4": two, "lora": seven, "lora_rank4": two, "ia3": seven | two}
    assert _widest(families) == sorted(seven)
    assert _widest({"base": two, "flora": two}) == sorted(two)
    assert _widest({}) == []
