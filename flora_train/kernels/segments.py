"""Tokens grouped by adapter, and conversions between tokens, units and segments.

Dimensions: T tokens, K segments, U units of `unit` tokens each, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Tokens grouped by adapter: segment k is tokens bounds[k]:bounds[k + 1] and uses row k of the stacked
    parameters."""

    bounds: tuple[int, ...]
    """K + 1 non-decreasing ints from 0 to T. Known on the host, so that no kernel waits for the device. Empty
    segments are allowed."""

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError(f"segment bounds must rise from 0, got {self.bounds}")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(k, start, end) of the segments that are not empty."""
        for k in range(len(self)):
            if self.bounds[k] < self.bounds[k + 1]:
                yield k, self.bounds[k], self.bounds[k + 1]

    @property
    def tokens(self) -> int:
        """T."""
        return self.bounds[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every segment."""
        return tuple(b - a for a, b in pairwise(self.bounds))

    @cached_property
    def unit(self) -> int:
        """The largest number of tokens that divides every segment: at least a row of the padded batch."""
        return gcd(*self.bounds) or 1

    @cached_property
    def even(self) -> bool:
        """Whether all segments have the same length."""
        return len(set(self.lengths)) == 1

    @cached_property
    def one_unit_each(self) -> bool:
        """Whether every segment is one unit."""
        return all(length == self.unit for length in self.lengths)

    def scaled(self, tokens_per_row: int) -> Segments:
        """Segments of tokens from segments of rows of this padded length."""
        return _scaled(self, tokens_per_row)


@lru_cache(maxsize=256)
def _scaled(segments: Segments, tokens_per_row: int) -> Segments:
    return Segments(tuple(bound * tokens_per_row for bound in segments.bounds))


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training steps, too
def segment_of_units(segments: Segments, device: torch.device) -> Tensor:
    """The segment of every unit, LongTensor [U]. Built once per batch, because building it waits for the
    device."""
    units_per_segment = torch.tensor([length // segments.unit for length in segments.lengths])
    return torch.arange(len(segments)).repeat_interleave(units_per_segment).to(device)


def to_units(tokens: Tensor, segments: Segments) -> Tensor:
    """[T, d] -> [U, unit, d]: a view."""
    return tokens.view(-1, segments.unit, tokens.shape[1])


def expand_to_units(stack: Tensor, segments: Segments) -> Tensor:
    """[K, ...] -> [U, ...]: each unit gets its segment's entry."""
    return stack if segments.one_unit_each else stack[segment_of_units(segments, stack.device)]


def reduce_units(units: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """[U, ...] -> [K, ...] of `dtype`: each segment gets the sum of its units."""
    if segments.one_unit_each:
        return units.to(dtype)
    sums = torch.zeros(len(segments), *units.shape[1:], dtype=dtype, device=units.device)
    return sums.index_add_(0, segment_of_units(segments, units.device), units.to(dtype))


def per_unit(numbers: Sequence[float], segments: Segments, like: Tensor) -> Tensor | float:
    """One number per segment as [U, 1, 1] of `like`'s dtype, or the number itself if all are equal."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return expand_to_units(per_segment(numbers, like), segments)


def per_segment(numbers: Sequence[float], like: Tensor) -> Tensor:
    """One number per segment as [K, 1, 1] of `like`'s dtype."""
    return _numbers(tuple(numbers), like.dtype, like.device)[:, None, None]


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for training steps, too
def _numbers(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def in_order(compute: Callable[..., Tensor], order: Tensor | None, *tokens: Tensor) -> Tensor:
    """`compute` on tokens [T, ...] grouped by adapter; `order` [T] is the position of each grouped token in
    the arguments.

    The result has the order of the arguments. None: the arguments are grouped already.
    """
    if order is None:
        return compute(*tokens)
    grouped = (tensor.index_select(0, order) for tensor in tokens)
    return compute(*grouped).index_select(0, order.argsort())


def check_order(segments: Segments, order: Tensor | None) -> None:
    """Raises ValueError unless order is None or [T]: a kernel would read other memory."""
    if order is not None:
        check_shape("order", order.shape, (segments.tokens,))


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError for another shape than expected, which is an error in the calling layer."""
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {expected}")
