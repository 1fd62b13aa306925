"""The routing of a batch: which rows use which adapter. Built once per batch and shared by all layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.adapters.pool import Pool
from flora_train.adapters.seeds import seeded_generator
from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.kernels.segments import Segments


@dataclass(frozen=True)
class Span:
    """Consecutive rows start:end whose adapters share a pool."""

    pool: Pool | None
    """None: rows of the base model."""
    start: int
    end: int
    segments: Segments
    """One segment per adapter, in rows from `start`."""
    slots: Tensor | None = None
    """LongTensor [K]: the adapters' rows in the pool."""
    specs: tuple[AdapterSpec, ...] = ()
    """The K adapters."""
    slot_range: slice | None = None
    """The same rows as `slots`, where they are consecutive."""

    def gather(self, module: str) -> dict[str, Tensor]:
        """Parameter -> [K, ...] of a module for the adapters of this span, differentiable into the pool's
        gradients."""
        assert self.pool is not None
        assert self.slots is not None
        if self.slot_range is not None and not torch.is_grad_enabled():
            return self.pool.views(module, self.slot_range)
        return self.pool.gather(module, self.slots)


@dataclass(frozen=True)
class RowNoise:
    """What dropout and NEFTune noise in one row depend on."""

    seed: int
    """Of the adapter's seed, the example and the step."""
    length: int
    """Tokens of the row without padding."""
    window: int = 0
    """Positions of its encoder window, which has no padding; 0 if there is none, or if it is as long as the
    tokens."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents that are packed into the row. Empty: it is one document."""


@dataclass(frozen=True)
class RowDraw:
    """The draw that a row belongs to in training, within which the load of a router is balanced."""

    number: int
    """Tells the draws of an adapter in one step apart."""
    share: float
    """1 / draws of the row's adapter in the whole step, on all processes."""


@dataclass(frozen=True)
class RowGoal:
    """What the gates of a row are to choose in training."""

    members: NDArray[np.int64]
    """int64 [tokens]: the member that each position is to choose, -1 for none."""
    share: float
    """Coefficient of a token's cross-entropy, the mean over layers, in the adapter's loss: gate_loss / learnt
    tokens of the row's adapter in the whole step, on all processes."""


@dataclass(frozen=True)
class EmbeddingNoise:
    """NEFTune noise on the input embeddings of one row."""

    row: int
    """Index in the batch."""
    spec: AdapterSpec
    noise: RowNoise

    def sample(self, width: int, device: torch.device) -> Tensor:
        """Uniform noise [length, width] of at most alpha / sqrt(L width) in a document of L tokens."""
        generator = seeded_generator(self.noise.seed, self.spec.seed_name, "input embeddings", device=device)
        uniform = torch.rand(self.noise.length, width, generator=generator, device=device) * 2.0 - 1.0
        lengths = self.noise.documents or (self.noise.length,)
        limits = [[self.spec.neftune_noise_alpha / (length * width) ** 0.5] for length in lengths]
        repeats = torch.tensor(lengths, device=device)
        return uniform * torch.tensor(limits, device=device).repeat_interleave(repeats, dim=0)


class TokenStep(Protocol):
    """Computes the adapted layers of a batch of one row in forwards of one token."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        """The output [..., out] of an AdapterLinear for x [..., in], one token in all."""
        ...


class MergedLayer(NamedTuple):
    """A linear layer with an adapter merged into it."""

    weight: Tensor
    """[out, in]."""
    bias: Tensor | None
    """[out]."""


@dataclass
class Routing:
    """The spans of one batch of B rows."""

    rows: int
    """B."""
    spans: tuple[Span, ...]
    order: Tensor | None = None
    """LongTensor [B] that groups the rows by adapter; None if they are grouped already."""
    inverse: Tensor | None = None
    """The inverse permutation of `order`."""
    noise: tuple[RowNoise | None, ...] | None = None
    """One per row, in grouped order; None for rows without noise. None: no noise at all (evaluation)."""
    embedding_noise: tuple[EmbeddingNoise, ...] = ()
    """NEFTune noise of the rows that have it."""
    draws: tuple[RowDraw | None, ...] | None = None
    """The draw of each row, in grouped order. None: no load is balanced."""
    lengths: tuple[int, ...] | None = None
    """Tokens of each row without padding, in grouped order. None: no row is padded."""
    goals: tuple[RowGoal | None, ...] | None = None
    """What the gates of each row are to choose, in grouped order. None: gates have no loss of their own."""
    loads: dict[object, object] = field(default_factory=dict, repr=False)
    """What the routers of a forward pass recorded of their load, for the backward."""
    merged: Mapping[str, MergedLayer] | None = None
    """Module name -> its layer with the only adapter of these rows merged, for forwards without gradients."""
    token_step: TokenStep | None = None
    """Computes forwards of one token without gradients, of one row of a switch adapter; None: the layers
    do."""
    _by_pools: dict[frozenset[int], tuple[Span, ...]] = field(default_factory=dict, repr=False)

    @property
    def only_span(self) -> Span | None:
        """The span of all rows, if they have one adapter; else None."""
        first = self.spans[0]
        return first if len(self.spans) == 1 and len(first.specs) == 1 else None

    def spans_for(self, pools: frozenset[int]) -> tuple[Span, ...]:
        """The spans for a layer that only the pools with these ids target; all other rows run the base
        layer."""
        if pools not in self._by_pools:
            spans = []
            for span in self.spans:
                if span.pool is None or id(span.pool) not in pools:
                    span = Span(None, span.start, span.end, span.segments)
                spans.append(span)
            self._by_pools[pools] = _merge_base_spans(spans)
        return self._by_pools[pools]

    def without(self, pools: frozenset[int]) -> tuple[Tensor, Routing] | None:
        """The rows of other pools than these (and of the base): their positions in grouped order, int64 [n],
        and a routing of them alone; None if there are none."""
        spans: list[Span] = []
        positions: list[int] = []
        for span in self.spans:
            if span.pool is not None and id(span.pool) in pools:
                continue
            moved = replace(span, start=len(positions), end=len(positions) + span.end - span.start)
            positions += range(span.start, span.end)
            spans.append(moved)
        if not positions:
            return None

        def chosen(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[position] for position in positions)

        rest = Routing(
            len(positions),
            tuple(spans),
            noise=chosen(self.noise),
            draws=chosen(self.draws),
            lengths=chosen(self.lengths),
            goals=chosen(self.goals),
            loads=self.loads,
        )
        return torch.tensor(positions), rest

    def dropout(self, x: Tensor, module: str, span: Span, *, tokens_per_row: int) -> Tensor:
        """Inverted dropout on the tokens x [T, in] of a span.

        A mask depends only on the row's noise, the adapter and the layer: a recomputed forward draws the same
        mask, and neither the other rows of the batch nor the padding that they cause change it.
        """
        if self.noise is None or not any(spec.dropout for spec in span.specs):
            return x
        mask = torch.ones_like(x)
        for k, first, end in span.segments:
            spec = span.specs[k]
            if not spec.dropout:
                continue
            for row in range(first, end):
                noise = self.noise[span.start + row]
                if noise is None:
                    continue
                generator = seeded_generator(noise.seed, spec.seed_name, module, device=x.device)
                length = noise.window if tokens_per_row == noise.window else noise.length
                keep = torch.rand(length, x.shape[1], generator=generator, device=x.device) >= spec.dropout
                start = row * tokens_per_row
                mask[start : start + length] = keep.to(x.dtype) / (1 - spec.dropout)
        return x * mask

    @torch.compiler.disable(reason="the noise changes with every batch")
    def perturb(self, embeddings: Tensor) -> Tensor:
        """Input embeddings [B, L, d] with NEFTune noise. Rows without noise keep all their bits.

        Noise depends only on the row's noise and the adapter: a recomputed forward adds the same, and neither
        the other rows of the batch nor the padding that they cause change it. Source: Jain et al., "NEFTune:
        Noisy Embeddings Improve Instruction Finetuning", ICLR 2024.
        """
        if not self.embedding_noise:
            return embeddings
        if embeddings.shape[0] != self.rows:
            shape = tuple(embeddings.shape)
            raise RuntimeError(f"input embeddings of shape {shape} do not hold the {self.rows} routed rows")
        noise = torch.zeros_like(embeddings)
        is_noisy = torch.zeros(self.rows, 1, 1, dtype=torch.bool, device=embeddings.device)
        for entry in self.embedding_noise:
            sample = entry.sample(embeddings.shape[-1], embeddings.device)[: embeddings.shape[1]]
            noise[entry.row, : len(sample)] = sample.to(embeddings.dtype)
            is_noisy[entry.row] = True
        return torch.where(is_noisy, embeddings + noise, embeddings)


class RouteRecorder(Protocol):
    """Gets what routers choose, layer by layer."""

    def add(self, spec: AdapterSpec, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
        """The choices of a router for some tokens of an adapter, without those of the padding.

        experts: int64 [T, k], -1 for a slot without; probabilities: float32 [T, E].
        """
        ...


class BatchRouting:
    """Holds the routing that all layers read.

    It must not change between a forward and the end of its backward, because activation checkpointing runs
    the forward again in between (guarantee I4).
    """

    def __init__(self) -> None:
        self.routing: Routing | None = None
        self.recomputes = False
        """Whether the current forward will run again in the backward."""
        self.recorder: RouteRecorder | None = None
        """Gets the choices of all routers; None: nobody wants them."""
        self.given_routes: Callable[[int], Sequence[Sequence[int]]] | None = None
        """Measurements only: the experts [T][k] of T tokens, in place of those that a switch adapter's router
        chooses (evaluation/generation/given_routes.py)."""
        self._pending_backwards = 0

    @property
    def learns(self) -> bool:
        """Whether the current forward will have a backward, also where checkpointing runs it without
        gradients first."""
        return torch.is_grad_enabled() or self._pending_backwards > 0

    def set(self, routing: Routing | None) -> None:
        """Raises RuntimeError while activation checkpointing still needs the previous routing."""
        if self._pending_backwards:
            raise RuntimeError(
                "the routing was changed before the backward pass of the previous batch ended, "
                "while activation checkpointing still needs it: "
                "call backward() first, or bank.abandon() if there will be none"
            )
        self.routing = routing

    def abandon(self) -> None:
        """Discard a forward whose backward will not run."""
        self._pending_backwards = 0
        self.routing = None

    def expect_backward(self, embeddings: Tensor) -> None:
        """Register a forward that the backward recomputes. The gradient of its embeddings is the last that is
        computed."""
        # Reentrant checkpointing needs an input that requires grad.
        embeddings.requires_grad_(True)
        self._pending_backwards += 1
        embeddings.register_hook(self._backward_ended)

    def _backward_ended(self, gradient: Tensor) -> None:
        self._pending_backwards = max(0, self._pending_backwards - 1)


def build_routing(
    ids: Sequence[int],
    location: Sequence[tuple[Pool, int]],
    device: torch.device,
    *,
    noise: Sequence[RowNoise | None] | None = None,
    draws: Sequence[RowDraw | None] | None = None,
    lengths: Sequence[int] | None = None,
    goals: Sequence[RowGoal | None] | None = None,
) -> Routing:
    """The routing for one adapter id per row (-1: base model); `location[id]` is its pool and its position
    there. noise, draws, lengths, goals: of each row."""
    order = sorted(range(len(ids)), key=lambda row: ids[row])
    runs = _runs([ids[row] for row in order])

    def pool_of(run: tuple[int, int, int]) -> Pool | None:
        return None if run[0] == BASE_ID else location[run[0]][0]

    spans: list[Span] = []
    for _, group in groupby(runs, key=lambda run: id(pool_of(run))):
        members = list(group)
        start, end = members[0][1], members[-1][2]
        segments = Segments((0, *(run_end - start for _, _, run_end in members)))
        pool = pool_of(members[0])
        if pool is None:
            spans.append(Span(None, start, end, segments))
            continue
        positions = [location[adapter][1] for adapter, _, _ in members]
        slots = [pool.slot_of[position] for position in positions]
        first, last = slots[0], slots[-1]
        slot_range = slice(first, last + 1) if slots == list(range(first, last + 1)) else None
        specs = tuple(pool.specs[position] for position in positions)
        index = torch.tensor(slots, device=device)
        spans.append(Span(pool, start, end, segments, index, specs, slot_range))
    grouped_noise = None if noise is None else tuple(noise[row] for row in order)
    on_embeddings = _embedding_noise(ids, location, noise or ())
    routing = Routing(
        len(ids),
        tuple(spans),
        noise=grouped_noise,
        embedding_noise=on_embeddings,
        draws=None if draws is None else tuple(draws[row] for row in order),
        lengths=None if lengths is None else tuple(lengths[row] for row in order),
        goals=None if goals is None else tuple(goals[row] for row in order),
    )
    if order == list(range(len(ids))):
        return routing
    permutation = torch.tensor(order, device=device)
    return replace(routing, order=permutation, inverse=permutation.argsort())


def _embedding_noise(
    ids: Sequence[int], location: Sequence[tuple[Pool, int]], noise: Sequence[RowNoise | None]
) -> tuple[EmbeddingNoise, ...]:
    entries = []
    for row, (adapter, row_noise) in enumerate(zip(ids, noise, strict=False)):
        if adapter == BASE_ID or row_noise is None:
            continue
        pool, member = location[adapter]
        spec = pool.specs[member]
        if spec.neftune_noise_alpha:
            entries.append(EmbeddingNoise(row, spec, row_noise))
    return tuple(entries)


def _runs(sorted_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(adapter id, first row, end row) for every run of equal ids."""
    runs: list[tuple[int, int, int]] = []
    for row, adapter in enumerate(sorted_ids):
        if runs and runs[-1][0] == adapter:
            runs[-1] = (adapter, runs[-1][1], row + 1)
        else:
            runs.append((adapter, row, row + 1))
    return runs


def _merge_base_spans(spans: list[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for span in spans:
        if span.pool is None and merged and merged[-1].pool is None:
            start = merged.pop().start
            span = Span(None, start, span.end, Segments((0, span.end - start)))
        merged.append(span)
    return tuple(merged)
