"""What do the verdicts say? pass@k per adapter and language, with intervals over problems, and how programs ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flora_train.config.errors import fail
from flora_train.evaluation.code.pass_at_k import pass_at_k


@dataclass(frozen=True)
class Score:
    """n: samples of each problem, the fewest; pass_at: k -> (value, low, high), means over problems; ended: status -> programs."""

    adapter: str
    language: str
    problems: int
    n: int
    pass_at: Mapping[int, tuple[float, float, float]]
    ended: Mapping[str, int]


def check_k(keys: Iterable[tuple[str, str, str, int]], ks: Sequence[int]) -> None:
    """keys: (adapter, language, name, sample). Raises UserError if some problem has fewer samples than the largest k."""
    counts = Counter(key[:3] for key in keys)
    fewest = min(counts, key=lambda problem: counts[problem])
    if max(ks) > counts[fewest]:
        words = f"is more than the {counts[fewest]} samples of {', '.join(fewest)}: ask for k <= {counts[fewest]}"
        raise fail("k", max(ks), words)


def score(
    records: Mapping[Any, Mapping[str, Any]], ks: Sequence[int], samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> list[Score]:
    """One Score for every adapter and language. Intervals resample problems (percentile bootstrap). Raises ValueError if some
    problem has fewer samples than the largest k."""
    statuses: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records.values():
        statuses[record["adapter"], record["language"]][record["name"]].append(record["status"])
    scores = []
    for (adapter, language), by_name in sorted(statuses.items()):
        n = min(map(len, by_name.values()))
        passed = [(len(ended), ended.count("OK")) for ended in by_name.values()]
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(passed), size=(samples, len(passed)))
        estimates = {}
        for k in ks:
            values = np.array([pass_at_k(count, good, k) for count, good in passed])
            low, high = np.quantile(values[drawn].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
            estimates[k] = (float(values.mean()), float(low), float(high))
        ended = Counter(status for ended in by_name.values() for status in ended)
        scores.append(Score(adapter, language, len(by_name), n, estimates, ended))
    return scores
