"""Batches hold every sequence of every contender once, within their limits."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from flora_train.evaluation.harness.batches import plan_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=30)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 120), st.one_of(st.none(), st.integers(1, 40)))
def test_every_row_is_in_one_batch_that_is_not_too_large(
    lengths: list[int], count: int, max_tokens: int, independent_up_to: int | None
) -> None:
    contenders = list(range(-1, count - 1))
    batches = plan_batches(lengths, contenders, max_tokens=max_tokens, independent_up_to=independent_up_to)
    rows = Counter(row for batch in batches for row in batch)
    assert rows == Counter((contender, i) for contender in contenders for i in range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for _, i in batch)
        assert len(batch) == 1 or longest * len(batch) <= max_tokens
        assert [contender for contender, _ in batch] == sorted(contender for contender, _ in batch)
        if independent_up_to is not None and longest > independent_up_to:
            assert {lengths[i] for _, i in batch} == {longest}
    first = [max(lengths[i] for _, i in batch) for batch in batches]
    assert first == sorted(first, reverse=True)


def test_contenders_share_batches_that_one_does_not_fill() -> None:
    assert plan_batches([3, 5], [-1, 0, 1], max_tokens=30) == [
        [(-1, 1), (-1, 0), (0, 1), (0, 0), (1, 1), (1, 0)]
    ]
    four = plan_batches([5, 5], [0, 1, 2, 3], max_tokens=39)
    assert [len({contender for contender, _ in batch}) for batch in four] == [2, 2]


def test_a_batch_that_one_contender_fills_is_not_mixed() -> None:
    batches = plan_batches([5] * 6, [0, 1], max_tokens=15)
    assert [{contender for contender, _ in batch} for batch in batches] == [{0}, {1}, {0}, {1}]
