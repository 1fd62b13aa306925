"""How likely is it that one of k samples passes? The unbiased estimator of Chen et al. (2021), "Evaluating Large Language Models
Trained on Code", section 2.1."""

from __future__ import annotations

from math import prod


def pass_at_k(n: int, passed: int, k: int) -> float:
    """1 - C(n - passed, k) / C(n, k): the chance that k of the n samples, drawn without replacement, hold one that passed.
    Raises ValueError unless 0 <= passed <= n and 1 <= k <= n."""
    if not (0 <= passed <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} wants k from 1 to n and 0 <= passed <= n, got n = {n}, passed = {passed}")
    if n - passed < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - passed + 1, n + 1))
