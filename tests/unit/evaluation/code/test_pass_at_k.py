"""pass_at_k equals its definition: the share of all draws of k samples that contain a pass."""

from __future__ import annotations

from itertools import combinations

import pytest

from flora_train.evaluation.code.scores import pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_draws_with_a_pass(n: int) -> None:
    for passed in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([True] * passed + [False] * (n - passed), k))
            assert pass_at_k(n, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize(("n", "passed", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n: int, passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, passed, k)
