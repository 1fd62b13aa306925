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
    base: Callable[[Tensor], Tensor],
    weight: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """y [T, outputs] of x [T, inputs]: the base model's product, changed where a token's adapter is
    multiplicative.

    base: x -> x W^T in the engine's own kernel; weight: W [outputs, inputs], called only where it is needed.
    Tokens of slots that the layer does not know are those of the base model. The rows of all ranks are
    multiplied by W together with the base's rows, so that W is read once; where a slot has so many tokens
    that forming W * M costs less (kernels/flora/cost_model.py), its tokens are multiplied by that.
    """
    used = {slot: factors.uses[slot] for slot in rows.tokens_of if slot in factors.uses}
    formed = tuple(slot for slot, use in used.items() if _forms(x, use, len(rows.tokens_of[slot])))
    if not formed:
        return _expanded(x, factors, rows, used=used, base=base, weight=weight, bias=bias)
    y = x.new_empty(len(x), sum(B.shape[2] for B in factors.B))
    positions, others = rows.without(formed, len(x))
    if len(positions):
        rest = {slot: use for slot, use in used.items() if slot not in formed}
        y[positions] = _expanded(
            x[positions], factors, others, used=rest, base=base, weight=weight, bias=bias
        )
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
    base: Callable[[Tensor], Tensor],
    weight: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`project` with one more row for each rank of each token."""
    slices = range(len(factors.B))
    plain = {slot: use for slot, use in used.items() if not any(use.scales)}
    added = [rows.added([(slot, use.ranks[s]) for slot, use in plain.items()]) for s in slices]
    scaling = [_scaling(used, s, "input") for s in slices]
    if len(factors.B) > 1 and any(scaling[s] or added[s] is not None for s in slices):
        sizes = [B.shape[2] for B in factors.B]
        y = x.new_empty(len(x), sum(sizes))
        for s, (part, W) in enumerate(zip(y.split(sizes, dim=1), weight().split(sizes), strict=True)):
            products = linear(_with_added(x, factors.A[s], rows, scaling[s], added[s]), W)
            part.copy_(products[: len(x)])
            _add_products(part, products[len(x) :], factors.B[s], added[s], _dropped(rows, plain, s))
    else:
        products = base(_with_added(x, factors.A[0], rows, scaling[0], added[0]))
        y = products[: len(x)]
        _add_products(y, products[len(x) :], factors.B[0], added[0], _dropped(rows, plain, 0))
    if bias is not None:
        y += bias
    _scale_outputs(y, factors, rows, used)
    return y


def _scaling(used: dict[int, SlotUse], s: int, what: str) -> tuple[int, ...]:
    """The slots that scale the input or the output of slice `s`."""
    return tuple(slot for slot, use in used.items() if use.scales[s] == what)


def _with_added(
    x: Tensor, A: Tensor, rows: BatchRows, scaling: tuple[int, ...], added: AddedRows | None
) -> Tensor:
    """[T + N, inputs]: x, scaled for the slots of `scaling`, and the added rows A[k] * x.

    A: [S, R, inputs].
    """
    if scaling:
        positions = rows.positions(scaling)
        x = x.index_add(0, positions, x[positions] * A[rows.slots_of_tokens(scaling), 0])
    if added is None:
        return x
    extended = x.new_empty(len(x) + len(added.tokens), x.shape[1])
    extended[: len(x)] = x
    gathered = torch.index_select(x, 0, added.tokens, out=extended[len(x) :])
    gathered *= A.flatten(0, 1).index_select(0, added.factors)
    return extended


def _dropped(rows: BatchRows, used: dict[int, SlotUse], s: int) -> Tensor | None:
    """Positions of the tokens to which the base model's product of slice `s` is not added."""
    slots = tuple(slot for slot, use in used.items() if not use.keep_base[s])
    return rows.positions(slots) if slots else None


def _add_products(
    y: Tensor, products: Tensor, B: Tensor, added: AddedRows | None, dropped: Tensor | None
) -> None:
    """Add the products [N, outputs] of the added rows, times B, to y [T, outputs]. B: [S, R, outputs]."""
    if added is None:
        return
    if dropped is not None:
        y[dropped] = 0
    products *= B.flatten(0, 1).index_select(0, added.factors)
    start = 0
    for group in added.groups:
        stop = start + group.count * group.rank
        terms = products[start:stop]
        if group.rank > 1:
            terms = terms.view(group.count, group.rank, -1).sum(1)
        if isinstance(group.tokens, slice):
            y[group.tokens] += terms
        else:
            y.index_add_(0, group.tokens, terms)
        start = stop


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
