"""One linear layer for a batch of tokens of different multiplicative adapters.

Dimensions: T tokens, S slots of the device, R the largest rank of a slot, `slices` of the outputs (query, key
and value are slices of one merged layer), each with factors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import linear

from flora_train.kernels.backend import MAX_TRITON_RANK, is_triton, splits
from flora_train.kernels.flora.cost_model import Work, thresholds_for
from flora_train.kernels.flora.op import flora_linear
from flora_train.kernels.segments import Segments
from flora_train.serving.batch_rows import AddedRows, BatchRows


@dataclass(frozen=True)
class SlotUse:
    """What the adapter in a slot does on one layer."""

    ranks: tuple[int, ...]
    """Rank on each slice; 0 where the slice is not adapted."""
    keep_base: tuple[bool, ...]
    """Whether the base model's product is added, for each slice."""
    scales: tuple[str, ...]
    """What an IA3 scales on each slice, 'input' or 'output'; '' for a fLoRA and where it is not adapted."""

    @property
    def rank(self) -> int:
        return max(self.ranks)


@dataclass
class LayerFactors:
    """The factors of all slots on one layer."""

    A: Sequence[Tensor]
    """For each slice [S, R, inputs]."""
    B: Sequence[Tensor]
    """For each slice [S, R, outputs of the slice]."""
    uses: dict[int, SlotUse] = field(default_factory=dict)
    """Slot -> its use. Slots that are not here leave the layer as it is."""


def project(
    x: Tensor,
    factors: LayerFactors,
    rows: BatchRows,
    *,
    product: Callable[[Tensor, int | None], Tensor],
    weight: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """y [T, outputs] of x [T, inputs]: the base model's product, changed where a token's adapter is
    multiplicative.

    product: x -> x W^T in the engine's own kernel, or with a number, the outputs of that slice; weight:
    W [outputs, inputs], called only where W * M is formed.
    Tokens of slots that the layer does not know are those of the base model. The rows of all ranks are
    multiplied by W together with the base's rows, so that W is read once; where a slot has so many tokens
    that forming W * M costs less (kernels/flora/cost_model.py), its tokens are multiplied by that.
    """
    used = {slot: factors.uses[slot] for slot in rows.tokens_of if slot in factors.uses}
    formed = tuple(slot for slot, use in used.items() if _forms(x, use, len(rows.tokens_of[slot])))
    if not formed:
        return _expanded(x, factors, rows, used=used, product=product, bias=bias)
    y = x.new_empty(len(x), sum(B.shape[2] for B in factors.B))
    positions, others = rows.without(formed, len(x))
    if len(positions):
        rest = {slot: use for slot, use in used.items() if slot not in formed}
        y[positions] = _expanded(x[positions], factors, others, used=rest, product=product, bias=bias)
    _add_formed(y, x, factors, rows, used={slot: used[slot] for slot in formed}, weight=weight(), bias=bias)
    return y


def _forms(x: Tensor, use: SlotUse, tokens: int) -> bool:
    return not any(use.scales) and forms_weight(use.rank, tokens, x.dtype, x.device.type)


@lru_cache(maxsize=4096)
def forms_weight(rank: int, tokens: int, dtype: torch.dtype, device: str) -> bool:
    """Whether W * M is formed for this many tokens of one adapter, because that costs less than one more row
    for each rank of each token. Costs are in tokens through W."""
    work = Work(
        rank=rank,
        residual=True,
        tokens=tokens,
        segments=1,
        in_features=1,
        out_features=1,
        bytes_each=dtype.itemsize,
        split=splits(dtype),
        device=device,
        triton=device == "cuda" and is_triton() and rank <= MAX_TRITON_RANK,
    )
    thresholds = thresholds_for(work)
    expanding = rank * tokens * thresholds.expanding / 100
    return expanding > thresholds.forming + thresholds.forming_a_rank * rank + work.split * tokens


def _expanded(
    x: Tensor,
    factors: LayerFactors,
    rows: BatchRows,
    *,
    used: dict[int, SlotUse],
    product: Callable[[Tensor, int | None], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`project` with one more row for each rank of each token."""
    plain = {slot: use for slot, use in used.items() if not any(use.scales)}
    sizes = [B.shape[2] for B in factors.B]
    parts = [_part(rows, used, plain, s=s, tokens=len(x)) for s in range(len(sizes))]
    if len(sizes) > 1 and any(part.changes for part in parts):
        y = x.new_empty(len(x), sum(sizes))
        for s, (part, of_slice) in enumerate(zip(parts, y.split(sizes, dim=1), strict=True)):
            products = product(part.inputs(x, factors.A[s], rows), s)
            of_slice.copy_(part.outputs(products, factors.B[s], len(x)))
    else:
        products = product(parts[0].inputs(x, factors.A[0], rows), None)
        y = parts[0].outputs(products, factors.B[0], len(x))
    if bias is not None:
        y += bias
    _scale_outputs(y, factors, rows, used)
    return y


@dataclass(frozen=True)
class Part:
    """One slice of the outputs: which rows are multiplied by its weight."""

    scaled: tuple[int, ...]
    """Slots of IA3s that scale the inputs."""
    added: AddedRows | None
    kept: Tensor | None
    """Positions of the tokens that have a row of their own, because the base model's product is part of their
    result; None: all."""

    @property
    def changes(self) -> bool:
        """Whether other rows than those of the base model are multiplied."""
        return bool(self.scaled) or self.added is not None

    def inputs(self, x: Tensor, A: Tensor, rows: BatchRows) -> Tensor:
        """The rows to be multiplied: x [T, inputs] of the kept tokens, then A[k] * x. A: [S, R, inputs]."""
        if self.scaled:
            positions = rows.positions(self.scaled)
            x = x.index_add(0, positions, x[positions] * A[rows.slots_of_tokens(self.scaled), 0])
        if self.added is None:
            return x
        own = x if self.kept is None else x[self.kept]
        inputs = x.new_empty(len(own) + self.added.count, x.shape[1])
        inputs[: len(own)] = own
        start = len(own)
        for group in self.added.groups:
            stop = start + group.rows
            out = inputs[start:stop].view(group.count, group.rank, -1)
            torch.mul(x[group.tokens][:, None], A[group.slots, : group.rank], out=out)
            start = stop
        return inputs

    def outputs(self, products: Tensor, B: Tensor, tokens: int) -> Tensor:
        """[T, outputs] from the products of `inputs`. B: [S, R, outputs]."""
        if self.added is None:
            return products
        start = len(products) - self.added.count
        if self.kept is None:
            y = products[:start]
        else:
            y = products.new_zeros(tokens, products.shape[1])
            y[self.kept] = products[:start]
        for group in self.added.groups:
            stop = start + group.rows
            terms = products[start:stop].view(group.count, group.rank, -1)
            scales = B[group.slots, : group.rank]
            if isinstance(group.tokens, slice):
                _add_terms(y[group.tokens], terms, scales)
            else:
                total = y.new_zeros(group.count, y.shape[1])
                _add_terms(total, terms, scales)
                y.index_add_(0, group.tokens, total)
            start = stop
        return y


def _part(
    rows: BatchRows, used: dict[int, SlotUse], plain: dict[int, SlotUse], *, s: int, tokens: int
) -> Part:
    """plain: the slots of fLoRAs among `used`; tokens: T."""
    dropped = tuple(slot for slot, use in plain.items() if not use.keep_base[s])
    return Part(
        scaled=_scaling(used, s, "input"),
        added=rows.added([(slot, use.ranks[s]) for slot, use in plain.items()]),
        kept=rows.all_but(dropped, tokens) if dropped else None,
    )


def _scaling(used: dict[int, SlotUse], s: int, what: str) -> tuple[int, ...]:
    """The slots that scale the input or the output of slice `s`."""
    return tuple(slot for slot, use in used.items() if use.scales[s] == what)


def _add_terms(y: Tensor, terms: Tensor, scales: Tensor) -> None:
    """Add the sum of terms * scales over the ranks, both [n, rank, outputs], to y [n, outputs]."""
    if y.is_cpu and y.dtype in (torch.float32, torch.float64):
        for k in range(terms.shape[1]):
            y.addcmul_(terms[:, k], scales[:, k])
    else:
        # The sum over the ranks is rounded once.
        y += terms.mul_(scales).sum(1)


def _scale_outputs(y: Tensor, factors: LayerFactors, rows: BatchRows, used: dict[int, SlotUse]) -> None:
    """Multiply the outputs of the IA3s that scale them by 1 + B."""
    start = 0
    for s, B in enumerate(factors.B):
        stop = start + B.shape[2]
        if slots := _scaling(used, s, "output"):
            positions, part = rows.positions(slots), y[:, start:stop]
            deviation = B[:, 0].index_select(0, rows.slots_of_tokens(slots))
            part.index_add_(0, positions, part[positions] * deviation)
        start = stop


def _add_formed(
    y: Tensor,
    x: Tensor,
    factors: LayerFactors,
    rows: BatchRows,
    *,
    used: dict[int, SlotUse],
    weight: Tensor,
    bias: Tensor | None,
) -> None:
    """Write the products by W * M of the slots in `used` into their rows of y."""
    sizes = [B.shape[2] for B in factors.B]
    for s, (part, W) in enumerate(zip(y.split(sizes, dim=1), weight.split(sizes), strict=True)):
        by_rank: dict[int, list[int]] = {}
        for slot, use in used.items():
            by_rank.setdefault(use.ranks[s], []).append(slot)
        for rank, slots in by_rank.items():
            positions = rows.positions(tuple(slots))
            tokens = x[positions]
            if rank == 0:
                part[positions] = linear(tokens, W)
                continue
            part[positions] = flora_linear(
                tokens,
                W,
                factors.A[s][slots, :rank],
                factors.B[s][slots, :rank].mT,
                offset=[float(used[slot].keep_base[s]) for slot in slots],
                segments=Segments(
                    tuple(accumulate((len(rows.tokens_of[slot]) for slot in slots), initial=0))
                ),
            )
    if bias is not None:
        y[rows.positions(tuple(used))] += bias
