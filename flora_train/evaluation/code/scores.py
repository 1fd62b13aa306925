"""pass@k and its differences, with intervals over problems from the same resamples for every contender."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.config.terminal_text import plain
from flora_train.evaluation.bootstrap import Estimate
from flora_train.evaluation.code.programs.verdicts import VerdictRecord

Cell = tuple[str, str]
"""(adapter, language)"""


def check_k(keys: Iterable[tuple[str, str, str, int]], ks: Sequence[int]) -> None:
    """Raises UserError if a problem has fewer samples than the largest k. keys: (adapter, language, name,
    sample)."""
    counts = Counter(key[:3] for key in keys)
    fewest = min(counts, key=lambda problem: counts[problem])
    if max(ks) > counts[fewest]:
        problem = plain(", ".join(fewest))
        hint = f"is more than the {counts[fewest]} samples of {problem}: give at most {counts[fewest]}"
        raise user_error("pass_at_k", max(ks), hint)


class Scores:
    """Scores of verdict records, which have adapter, language, name, status and optionally suspicious.

    Intervals are percentile bootstrap intervals over problems. Differences are paired, over problems that
    both contenders have tried.
    """

    def __init__(
        self,
        records: Iterable[VerdictRecord],
        *,
        resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
        seeds: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        """seeds: name of a mean over seeds -> the adapters that it is the mean of."""
        self.seeds = seeds
        self.resamples, self.tail, self.seed = resamples, (1 - confidence) / 2, seed
        self.ended: dict[Cell, Counter[str]] = defaultdict(Counter)
        self.early_exits: Counter[Cell] = Counter()
        self._passed: dict[Cell, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for record in records:
            cell = record["adapter"], record["language"]
            self.ended[cell][record["status"]] += 1
            self.early_exits[cell] += bool(record.get("suspicious"))
            self._passed[cell][record["name"]].append(record["status"] == "OK")
        self.cells: list[Cell] = sorted(self._passed)
        self._draws: dict[tuple[str, int], NDArray[np.int64]] = {}

    def has(self, cell: Cell) -> bool:
        """Whether there are verdicts on this adapter in this language."""
        return all(member in self._passed for member in self._members(cell))

    def problems(self, cell: Cell) -> list[str]:
        """The names of the problems that it tried."""
        first, *others = (self._passed[member].keys() for member in self._members(cell))
        return sorted(set(first).intersection(*others))

    def num_samples(self, cell: Cell) -> int:
        """Samples per problem; the smallest number where they differ."""
        return min(
            (len(samples) for member in self._members(cell) for samples in self._passed[member].values()),
            default=0,
        )

    def count_ended(self, cell: Cell) -> Counter[str]:
        """Status -> number of programs; of a mean over seeds, of all of them."""
        return sum((self.ended[member] for member in self._members(cell)), Counter())

    def count_early_exits(self, cell: Cell) -> int:
        """Programs that passed, but end early."""
        return sum(self.early_exits[member] for member in self._members(cell))

    def pass_at(self, cell: Cell, k: int) -> Estimate:
        """The mean over problems. Raises ValueError if a problem has fewer than k samples.

        If no problem, or every problem, is always solved, resampling shows no variation. The interval then
        ends at the exact bound for a share of this many problems (Clopper & Pearson 1934).
        """
        return self._mean([(cell[1], self._values(cell, self.problems(cell), k))])

    def difference(self, adapter: str, other: str, *, language: str, k: int) -> Estimate:
        """pass@k of `adapter` minus that of `other`.

        If the two are equal on every problem, resampling shows no variation. The interval is then the exact
        bound for the share of problems on which they could differ.
        """
        return self._mean([self._paired((adapter, language), (other, language), k)], of_shares=False)

    def macro(self, adapters: Mapping[str, str], k: int) -> Estimate:
        """The mean over languages with equal weights. adapters: language -> adapter."""
        cells = [(adapter, language) for language, adapter in adapters.items()]
        return self._mean([(cell[1], self._values(cell, self.problems(cell), k)) for cell in cells])

    def macro_difference(self, adapters: Mapping[str, str], others: Mapping[str, str], k: int) -> Estimate:
        """The mean of the differences over languages; both mappings have the same languages."""
        parts = [
            self._paired((adapters[language], language), (others[language], language), k)
            for language in adapters
        ]
        return self._mean(parts, of_shares=False)

    def _values(self, cell: Cell, names: Sequence[str], k: int) -> NDArray[np.float64]:
        values = []
        for member in self._members(cell):
            passed = self._passed[member]
            values.append([pass_at_k(len(passed[name]), sum(passed[name]), k) for name in names])
        return np.array(values, dtype=np.float64).mean(axis=0)

    def _members(self, cell: Cell) -> list[Cell]:
        adapter, language = cell
        return [(member, language) for member in self.seeds.get(adapter, (adapter,))]

    def _paired(self, cell: Cell, other: Cell, k: int) -> tuple[str, NDArray[np.float64]]:
        tried = set(self.problems(other))
        names = [name for name in self.problems(cell) if name in tried]
        return cell[1], self._values(cell, names, k) - self._values(other, names, k)

    def _mean(self, parts: Sequence[tuple[str, NDArray[np.float64]]], of_shares: bool = True) -> Estimate:
        """The mean of the means of (language, value per problem) parts, each resampled separately."""
        value = float(np.mean([values.mean() for _, values in parts]))
        num_problems = sum(len(values) for _, values in parts)
        bound = 1 - self.tail ** (1 / num_problems)
        if of_shares and value in (0.0, 1.0):
            return Estimate(value, max(0.0, value - bound), min(1.0, value + bound))
        if not of_shares and not any(values.any() for _, values in parts):
            return Estimate(0.0, -bound, bound)
        means = [values[self._resamples(language, len(values))].mean(axis=1) for language, values in parts]
        low, high = np.quantile(np.mean(means, axis=0), [self.tail, 1 - self.tail])
        return Estimate(value, float(low), float(high))

    def _resamples(self, language: str, num_problems: int) -> NDArray[np.int64]:
        """[resamples, problems]: the same for all contenders in a language, so that differences are
        paired."""
        key = language, num_problems
        if key not in self._draws:
            generator = np.random.default_rng([self.seed, crc32(language.encode())])
            self._draws[key] = generator.integers(num_problems, size=(self.resamples, num_problems))
        return self._draws[key]


def pass_at_k(n: int, passed: int, k: int) -> float:
    """1 - C(n - passed, k) / C(n, k): the probability that one of k samples, drawn from n without
    replacement, passed.

    Raises ValueError unless 0 <= passed <= n and 1 <= k <= n.
    """
    if not (0 <= passed <= n and 1 <= k <= n):
        raise ValueError(
            f"pass@{k} requires 1 <= k <= n and 0 <= passed <= n, got n = {n}, passed = {passed}"
        )
    if n - passed < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(n - passed + 1, n + 1))
