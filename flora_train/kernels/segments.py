"""Which tokens belong to which adapter of the batch?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Segments:
    """Tokens grouped by adapter: segment k is tokens bounds[k]:bounds[k + 1] and uses row k of the stacks.

    bounds: K + 1 non-decreasing ints from 0 to T, known on the host, so that no kernel has to wait for the device.
    Empty segments are allowed.
    """

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or any(a > b for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"segment bounds must rise from 0, got {self.bounds}")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(k, start, end) of the segments that hold tokens."""
        for k in range(len(self)):
            if self.bounds[k] < self.bounds[k + 1]:
                yield k, self.bounds[k], self.bounds[k + 1]

    @property
    def tokens(self) -> int:
        return self.bounds[-1]

    def scaled(self, tokens_per_row: int) -> Segments:
        """Segments of rows turned into segments of tokens, for rows of equal padded length."""
        return Segments(tuple(bound * tokens_per_row for bound in self.bounds))


def check_stack(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Shapes are our own contract between layer and kernel: a mismatch is a bug, said clearly."""
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {expected}")
