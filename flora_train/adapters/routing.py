"""Which rows of the current batch use which adapter? Worked out once per batch, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora_train.adapters.pool import Pool, seeded_generator
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.segments import Segments


@dataclass(frozen=True)
class Span:
    """Neighbouring rows start:end whose adapters share a pool (None: base model rows).

    segments: one per adapter, in rows from `start`; slots: LongTensor [K], their rows in the pool.
    """

    pool: Pool | None
    start: int
    end: int
    segments: Segments
    slots: Tensor | None = None
    specs: tuple[AdapterSpec, ...] = ()


@dataclass(frozen=True)
class RowNoise:
    """What dropout in a row depends on: a seed of the example and step, the row's tokens without padding, and the positions of its
    encoder window, which has no padding (0: there is none, or it is as long as the tokens)."""

    seed: int
    length: int
    window: int = 0


@dataclass
class Routing:
    """The batch's spans. order: LongTensor [B] that groups rows by adapter, None if they already are."""

    rows: int
    spans: tuple[Span, ...]
    order: Tensor | None = None
    inverse: Tensor | None = None
    noise: tuple[RowNoise, ...] | None = None
    """One per row, as grouped. None: no dropout (evaluation)."""
    _by_pools: dict[frozenset[int], tuple[Span, ...]] = field(default_factory=dict, repr=False)

    def spans_for(self, pools: frozenset[int]) -> tuple[Span, ...]:
        """The spans as a layer sees them that only the pools with these ids target: other rows run the base."""
        if pools not in self._by_pools:
            self._by_pools[pools] = _merge_base(
                [s if s.pool is not None and id(s.pool) in pools else Span(None, s.start, s.end, s.segments) for s in self.spans]
            )
        return self._by_pools[pools]

    def dropout(self, x: Tensor, module: str, span: Span, tokens_per_row: int) -> Tensor:
        """Inverted dropout on the tokens x [T, in] of a span.

        Masks depend on (row's noise, adapter, layer) only: a recomputed forward draws the same ones, and neither
        neighbours in the batch nor the padding that they cause change them.
        """
        if self.noise is None or not any(spec.dropout for spec in span.specs):
            return x
        mask = torch.ones_like(x)
        for k, first, end in span.segments:
            if not (rate := span.specs[k].dropout):
                continue
            for row in range(first, end):
                noise = self.noise[span.start + row]
                generator = seeded_generator(noise.seed, span.specs[k].name, module, device=x.device)
                length = noise.window if tokens_per_row == noise.window else noise.length
                keep = torch.rand(length, x.shape[1], generator=generator, device=x.device) >= rate
                start = row * tokens_per_row
                mask[start : start + length] = keep.to(x.dtype) / (1 - rate)
        return x * mask


class BatchRouting:
    """Holds the routing that all layers read. It must not change between a forward and the end of its backward,
    because activation checkpointing runs the forward again in between (guarantee I4)."""

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.recomputes = False
        """Whether the running forward will be run again in the backward."""
        self._backwards_due = 0

    def set(self, routing: Routing | None) -> None:
        if self._backwards_due:
            raise RuntimeError(
                "the routing was changed before the backward pass of the previous batch ended, while activation "
                "checkpointing still needs it: call backward() first, or bank.abandon() if there will be none"
            )
        self.routing = routing

    def abandon(self) -> None:
        """Forget a forward whose backward will not run."""
        self._backwards_due = 0
        self.routing = None

    def expect_backward(self, embeddings: Tensor) -> None:
        """Count a recomputing forward; the gradient of its embeddings is the last that its backward computes."""
        embeddings.requires_grad_(True)  # reentrant checkpointing needs an input that asks for gradients
        self._backwards_due += 1
        embeddings.register_hook(self._backward_ended)

    def _backward_ended(self, gradient: Tensor) -> None:
        self._backwards_due = max(0, self._backwards_due - 1)


def build_routing(
    ids: Sequence[int],
    locate: Sequence[tuple[Pool, int]],
    device: torch.device,
    noise: Sequence[RowNoise] | None = None,
) -> Routing:
    """Routing for one adapter id a row (-1: base); `locate[id]` is its pool and its number there."""
    order = sorted(range(len(ids)), key=lambda row: ids[row])
    grouped = [ids[row] for row in order]
    runs: list[tuple[int, int, int]] = []  # adapter id, first row, end row
    for row, adapter in enumerate(grouped):
        if runs and runs[-1][0] == adapter:
            runs[-1] = (adapter, runs[-1][1], row + 1)
        else:
            runs.append((adapter, row, row + 1))
    spans: list[Span] = []
    while runs:
        pool = locate[runs[0][0]][0] if runs[0][0] >= 0 else None
        length = next(
            (i for i, run in enumerate(runs) if (locate[run[0]][0] if run[0] >= 0 else None) is not pool),
            len(runs),
        )
        members, runs = runs[:length], runs[length:]
        start, end = members[0][1], members[-1][2]
        segments = Segments((0, *(run[2] - start for run in members)))
        if pool is None:
            spans.append(Span(None, start, end, segments))
            continue
        numbers = [locate[run[0]][1] for run in members]
        slots = [pool.slot_of[number] for number in numbers]
        specs = tuple(pool.specs[number] for number in numbers)
        spans.append(Span(pool, start, end, segments, torch.tensor(slots, device=device), specs))
    grouped_noise = None if noise is None else tuple(noise[row] for row in order)
    if order == list(range(len(ids))):
        return Routing(len(ids), tuple(spans), noise=grouped_noise)
    permutation = torch.tensor(order, device=device)
    return Routing(len(ids), tuple(spans), permutation, permutation.argsort(), grouped_noise)


def _merge_base(spans: list[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for span in spans:
        if span.pool is None and merged and merged[-1].pool is None:
            start = merged.pop().start
            span = Span(None, start, span.end, Segments((0, span.end - start)))
        merged.append(span)
    return tuple(merged)
