"""Finds near-duplicates of code by token shingles, compared exactly (the corpora are small)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

SHINGLE_TOKENS = 5
_TOKEN = re.compile(r"\w+|[^\w\s]")


def shingles(code: str) -> frozenset[tuple[str, ...]]:
    """All runs of `SHINGLE_TOKENS` tokens of `code`; white space does not count."""
    tokens = _TOKEN.findall(code)
    return frozenset(
        tuple(tokens[i : i + SHINGLE_TOKENS]) for i in range(max(1, len(tokens) - SHINGLE_TOKENS + 1))
    )


def renamed_form(code: str) -> str:
    """`code` with its words numbered in order of appearance: equal for code that differs only in names."""
    numbers: dict[str, str] = {}
    return " ".join(
        numbers.setdefault(token, f"w{len(numbers)}") if token[0].isalpha() or token[0] == "_" else token
        for token in _TOKEN.findall(code)
    )


class NearDuplicateIndex:
    """The code taken so far.

    `similarity` of a new text is |common shingles| / |union| (Jaccard) with the closest one, or, for
    `contained`, |common shingles| / |shingles of the new text|, which also finds a function inside a whole
    file.
    """

    def __init__(self) -> None:
        self._renamed: set[str] = set()
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def add(self, code: str) -> None:
        """Remember `code`."""
        parts = shingles(code)
        self._renamed.add(renamed_form(code))
        for part in parts:
            self._holders[part].append(len(self._sizes))
        self._sizes.append(len(parts))

    def has_renamed(self, code: str) -> bool:
        """Whether a remembered text is `code` up to the choice of names and white space."""
        return renamed_form(code) in self._renamed

    def similarity(self, code: str, contained: bool = False) -> float:
        """Similarity of `code` to the closest remembered text, 0 to 1."""
        parts = shingles(code)
        common = Counter(holder for part in parts for holder in self._holders.get(part, ()))
        if contained:
            return max((count / len(parts) for count in common.values()), default=0.0)
        return max(
            (count / (len(parts) + self._sizes[holder] - count) for holder, count in common.items()),
            default=0.0,
        )
