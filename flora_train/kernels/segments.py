"""Which tokens belong to which adapter of the batch?"""

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
    """Tokens grouped by adapter: segment k is tokens bounds[k]:bounds[k + 1] and uses row k of the stacks.

    bounds: K + 1 non-decreasing ints from 0 to T, known on the host, so that no kernel has to wait for the device.
    Empty segments are allowed.
    ranks: K ints, of which row k of the stacks uses the first ranks[k]; what lies beyond is neither read nor given a
    gradient, whatever it holds. None: all of them.
    """

    bounds: tuple[int, ...]
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or self.bounds[0] != 0 or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError(f"segment bounds must rise from 0, got {self.bounds}")
        if self.ranks is not None and (len(self.ranks) != len(self) or min(self.ranks) < 1):
            raise ValueError(f"one rank from 1 a segment, got {self.ranks} for {len(self)} segments")

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
    def one_row_each(self) -> bool:
        """Whether every segment is one row of `unit` tokens."""
        return all(length == self.unit for length in self.lengths)

    def scaled(self, tokens_per_row: int) -> Segments:
        """Segments of rows turned into segments of tokens, for rows of equal padded length."""
        return _scaled(self, tokens_per_row)


@lru_cache(maxsize=256)
def _scaled(segments: Segments, tokens_per_row: int) -> Segments:
    return Segments(tuple(bound * tokens_per_row for bound in segments.bounds), segments.ranks)


@lru_cache(maxsize=256)
def segment_of_rows(segments: Segments, device: torch.device) -> Tensor:
    """The segment of every row of `unit` tokens, LongTensor [T / unit]. Made once per batch, not once per layer: making it
    would wait for the device."""
    rows = [k for k, length in enumerate(segments.lengths) for _ in range(length // segments.unit)]
    return torch.tensor(rows, dtype=torch.long, device=device)


def in_rows(tokens: Tensor, segments: Segments) -> Tensor:
    """[T, d] -> [rows, unit, d]: a view."""
    return tokens.view(-1, segments.unit, tokens.shape[1])


def to_rows(stack: Tensor, segments: Segments) -> Tensor:
    """[K, ...] -> [rows, ...]: each row gets its segment's entry."""
    return stack if segments.one_row_each else stack[segment_of_rows(segments, stack.device)]


def from_rows(rows: Tensor, segments: Segments, dtype: torch.dtype) -> Tensor:
    """[rows, ...] -> [K, ...] of `dtype`: each segment gets the sum of its rows."""
    if segments.one_row_each:
        return rows.to(dtype)
    summed = torch.zeros(len(segments), *rows.shape[1:], dtype=dtype, device=rows.device)
    return summed.index_add_(0, segment_of_rows(segments, rows.device), rows.to(dtype))


def per_row(numbers: Sequence[float], segments: Segments, like: Tensor) -> Tensor | float:
    """One number per segment as [rows, 1, 1] of `like`'s type, or the number itself where all are the same."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return to_rows(per_segment(numbers, like), segments)


def per_segment(numbers: Sequence[float], like: Tensor) -> Tensor:
    """One number per segment as [K, 1, 1] of `like`'s type."""
    return _numbers(tuple(numbers), like.dtype, like.device)[:, None, None]


@lru_cache(maxsize=256)
def _numbers(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def within_ranks(stack: Tensor, segments: Segments, dim: int) -> Tensor:
    """A stack [K, ...] with zeros beyond every segment's own rank along `dim`, differentiable."""
    if segments.ranks is None:
        return stack
    return torch.where(_rank_mask(segments, stack.shape[dim], stack.dim(), dim, stack.device), stack, 0.0)


@lru_cache(maxsize=256)
def _rank_mask(segments: Segments, rank: int, dims: int, dim: int, device: torch.device) -> Tensor:
    used = torch.arange(rank, device=device) < torch.tensor(segments.ranks, device=device)[:, None]
    return used.view(len(segments), *(rank if i == dim else 1 for i in range(1, dims)))


def in_order(compute: Callable[..., Tensor], order: Tensor | None, *tokens: Tensor) -> Tensor:
    """`compute` of tokens [T, ...] grouped by adapter, for tokens whose groups lie where `order` [T] says; the result lies as
    they do."""
    if order is None:
        return compute(*tokens)
    return compute(*(tensor.index_select(0, order) for tensor in tokens)).index_select(0, order.argsort())


def check_layout(segments: Segments, rank: int, order: Tensor | None) -> None:
    """Ranks and order reach beyond neither stacks nor tokens: a kernel would read whatever lies there."""
    if segments.ranks is not None and max(segments.ranks) > rank:
        raise ValueError(f"a segment uses {max(segments.ranks)} ranks of stacks that hold {rank}")
    if order is not None:
        check_stack("order", order.shape, (segments.tokens,))


def check_stack(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Shapes are our own contract between layer and kernel: a mismatch is a bug, said clearly."""
    if tuple(shape) != expected:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {expected}")
