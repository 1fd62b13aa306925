"""Means over languages cover the same languages for all families; differences grow linearly in number."""

from __future__ import annotations

from flora_train.evaluation.bootstrap import MAX_PAIRED
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.scores import Scores
from flora_train.evaluation.code.summary import _differences, _widest


def test_the_mean_is_over_the_languages_that_most_families_share() -> None:
    seven, two = frozenset("abcdefg"), frozenset("hi")
    families = {
        "base": seven | two,
        "flora": seven,
        "flora_rank4": two,
        "lora": seven,
        "lora_rank4": two,
        "ia3": seven | two,
    }
    assert _widest(families) == sorted(seven)
    assert _widest({"base": two, "flora": two}) == sorted(two)
    assert _widest({}) == []


def test_many_contenders_are_compared_with_base_and_best_only() -> None:
    names = ["base", *(f"adapter{i}" for i in range(3 * MAX_PAIRED))]
    contenders = [Contender(name, name, -1, ("lua",), "") for name in names]
    records = []
    for name in names:
        for problem in ("p", "q"):
            status = "OK" if name == "adapter7" or (name != "base" and problem == "q") else "Exception"
            records.append(
                {"adapter": name, "language": "lua", "name": problem, "sample": 0, "status": status}
            )
    scores = Scores(records, resamples=50)
    differences = _differences(contenders, "lua", scores, ks=[1])
    with_base = [difference for difference in differences if difference.second == "base"]
    others = [difference for difference in differences if difference.second != "base"]
    assert [difference.first for difference in with_base] == names[1:]
    assert len(others) == 3 * MAX_PAIRED - 1
    assert all("adapter7" in (difference.first, difference.second) for difference in others)
    few = contenders[: MAX_PAIRED // 2]
    pairs = len(few) * (len(few) - 1) // 2
    assert len(_differences(few, "lua", scores, ks=[1])) == pairs


def test_two_contenders_of_one_family_are_both_compared_with_the_base() -> None:
    contenders = [
        Contender(name, family, -1, ("lua",), "")
        for name, family in (("base", "base"), ("a", "flora"), ("b", "flora"))
    ]
    records = [
        {"adapter": contender.name, "language": "lua", "name": "p", "sample": 0, "status": "OK"}
        for contender in contenders
    ]
    differences = _differences(contenders, "lua", Scores(records, resamples=50), ks=[1])
    assert [(d.first, d.second) for d in differences] == [
        ("flora", "base"),
        ("flora", "base"),
        ("flora", "flora"),
    ]
