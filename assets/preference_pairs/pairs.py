"""Which programs of a problem become pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

MOST_PAIRS = 4
"""Pairs of one problem in one language."""
FAILURES = ("AssertionError", "Exception", "SyntaxError", "Timeout")
"""How the rejected program may have ended, the most instructive first: a wrong result is closest to a right
one."""


class PairError(Exception):
    """Samples that cannot be used; the text is the one line that is printed."""


@dataclass(frozen=True)
class Sample:
    """One program as an adapter wrote it, and how it ended."""

    language: str
    name: str
    prompt: str
    completion: str
    """Up to its stop token, without white space at the end."""
    adapter: str
    sample: int
    status: str
    passed: bool
    """Its tests passed, and it did not leave before they ran."""
    whole: bool
    """It ended by itself, not at the limit of tokens."""


@dataclass(frozen=True)
class Pair:
    """Two programs for one problem."""

    problem: str
    chosen: Sample
    rejected: Sample

    def row(self) -> dict[str, str]:
        """The example, with its origin."""
        return {
            "prompt": self.chosen.prompt,
            "chosen": self.chosen.completion,
            "rejected": self.rejected.completion,
            "problem": self.problem,
            "chosen_from": self.chosen.adapter,
            "rejected_from": self.rejected.adapter,
            "rejected_status": self.rejected.status,
        }


def make_pairs(samples: Sequence[Sample], most_pairs: int) -> list[Pair]:
    """Pairs of every problem of one language that has programs of both kinds."""
    pairs: list[Pair] = []
    for name in dict.fromkeys(sample.name for sample in samples):
        programs = [sample for sample in samples if sample.name == name]
        passing = different([sample for sample in programs if sample.passed])
        failing = different([sample for sample in programs if _may_be_rejected(sample)])
        failing.sort(key=lambda sample: FAILURES.index(sample.status))
        if not passing or not failing:
            continue
        number = min(most_pairs, max(len(passing), len(failing)))
        both = zip(cycle(passing), cycle(failing), strict=False)
        of_problem = dict.fromkeys(islice(both, number))
        pairs += [Pair(name, chosen, rejected) for chosen, rejected in of_problem]
    return pairs


def _may_be_rejected(sample: Sample) -> bool:
    """A program that was cut at the limit of tokens says nothing about what it would have become."""
    return not sample.passed and sample.whole and sample.status in FAILURES


def different(samples: Sequence[Sample]) -> list[Sample]:
    """The first of those that differ in white space only; empty completions are left out."""
    first: dict[str, Sample] = {}
    for sample in samples:
        text = "".join(sample.completion.split())
        if text:
            first.setdefault(text, sample)
    return list(first.values())
