"""Splits of labelled texts: the test set first, in whole groups, then training sets within each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .example import Example, shuffled, variant_key

TEST_SHARE, MOST_TEST_SHARE = 0.25, 0.5
"""Shares of a label's texts: whole groups are moved to the test set until the first is reached, and none that
would exceed the second."""
MOST_TEST = 300
"""Texts of a test set, a stratified sample of the texts that are not for training."""
LEAST_TEST = 5
"""Texts of each label in the test set, if there are as many."""
SIZES = (50, 200, 1000)
"""Texts of the training sets."""


class SplitError(Exception):
    """The splits are not what they promise."""


@dataclass(frozen=True)
class Split:
    """Texts that are tested on, and texts that may be trained on, in the order in which they are taken."""

    test: list[Example]
    pool: list[Example]
    variants: int
    """Texts that were left out because they differ from a test text in side, encounter or number only."""

    def training_set(self, size: int) -> list[Example]:
        """The first texts of the pool: a smaller set is part of a larger one, and each has all labels."""
        return self.pool[:size]

    def sizes(self) -> list[int]:
        """The sizes of SIZES that differ: the last is all that there are, where they are fewer."""
        return [size for i, size in enumerate(SIZES) if i == 0 or SIZES[i - 1] < len(self.pool)]


def split(examples: Sequence[Example], seed: str) -> Split:
    """The test set and the pool of one task. Raises SplitError if they share texts or lack labels."""
    by_label: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_label[example.label].append(example)
    tested: set[str] = set()
    for label in sorted(by_label):
        tested |= _test_groups(by_label[label], f"{seed}/{label}")
    held_out = [example for example in examples if example.group in tested]
    keys = {variant_key(example.text) for example in held_out}
    rest = [example for example in examples if example.group not in tested]
    allowed = [example for example in rest if variant_key(example.text) not in keys]
    test = _sample(held_out, f"{seed}/test")
    result = Split(test, _pool(allowed, f"{seed}/train"), len(rest) - len(allowed))
    check(result)
    return result


def check(result: Split) -> None:
    """Raise SplitError if a test text, group or variant is trained on, or a label is in one part only."""
    pairs = {
        "a group": ({e.group for e in result.test}, {e.group for e in result.pool}),
        "a text": ({e.text for e in result.test}, {e.text for e in result.pool}),
        "a variant": ({variant_key(e.text) for e in result.test}, {variant_key(e.text) for e in result.pool}),
    }
    for name, (test, pool) in pairs.items():
        if shared := sorted(test & pool):
            raise SplitError(f"{name} is in the test set and in training: {shared[0]!r}")
    labels = {example.label for example in result.test}
    if len(labels) < 2:
        raise SplitError("the test set has fewer than two labels")
    for size in SIZES:
        trained = {example.label for example in result.training_set(size)}
        if trained != labels:
            raise SplitError(f"labels are not in both splits: {sorted(trained ^ labels)[0]!r}")


def _test_groups(examples: Iterable[Example], seed: str) -> set[str]:
    """Groups of one label for the test set."""
    sizes = Counter(example.group for example in examples)
    total, taken = sum(sizes.values()), 0
    groups: set[str] = set()
    for group in shuffled(sizes, seed, str):
        if taken >= TEST_SHARE * total:
            break
        if taken + sizes[group] <= MOST_TEST_SHARE * total:
            groups.add(group)
            taken += sizes[group]
    return groups


def _sample(examples: Sequence[Example], seed: str) -> list[Example]:
    """At most MOST_TEST of them: each label has its share, and LEAST_TEST where there are as many."""
    sizes = Counter(example.label for example in examples)
    left = _quotas(sizes, MOST_TEST)
    chosen = []
    for example in shuffled(examples, seed, _name):
        if left[example.label] > 0:
            left[example.label] -= 1
            chosen.append(example)
    return chosen


def _quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Label -> number of texts, together `total` or all that there are."""
    everything = sum(sizes.values())
    if everything <= total:
        return dict(sizes)
    quotas = {label: min(size, LEAST_TEST) for label, size in sizes.items()}
    while sum(quotas.values()) < total:
        open_labels = [label for label, size in sizes.items() if quotas[label] < size]
        # the label that is farthest below its share
        label = min(open_labels, key=lambda name: (quotas[name] / sizes[name], name))
        quotas[label] += 1
    return quotas


def _pool(examples: Sequence[Example], seed: str) -> list[Example]:
    """All of them in random order, but first one of each label, so that every training set has all labels."""
    order = shuffled(examples, seed, _name)
    first: dict[str, Example] = {}
    for example in order:
        first.setdefault(example.label, example)
    chosen = set(first.values())
    return [*first.values(), *(example for example in order if example not in chosen)]


def _name(example: Example) -> str:
    return f"{example.source}/{example.text}"
