"""One linear layer for a batch of tokens of different multiplicative adapters.

Dimensions: T tokens, S slots of the device, R the largest rank of a slot, `slices` of the outputs (query, key
and value are slices of one merged layer), each with factors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from flora_train.kernels.flora.inference import multiply_modulated
from flora_train.kernels.flora.op import flora_linear
from flora_train.serving.batch_rows import BatchRows
from flora_train.serving.layer_plan import FormedGroup, LayerPlan, SlicePlan, SlotUse, plan_layer

Product = Callable[[Tensor, int | None], Tensor]
"""x -> x W^T in the engine's own kernel, or with a number, the outputs of that slice."""


@dataclass
class LayerFactors:
    """The factors of all slots on one layer."""

    A: Sequence[Tensor]
    """For each slice [S, R, inputs]."""
    B: Sequence[Tensor]
    """For each slice [S, R, outputs of the slice]."""
    uses: dict[int, SlotUse] = field(default_factory=dict)
    """Slot -> its use. Slots that are not here leave the layer as it is. Changed by `use` and `drop` only."""
    _last: tuple[BatchRows, int, torch.dtype, LayerPlan] | None = None

    def use(self, slot: int, use: SlotUse) -> None:
        """Change what a slot does."""
        self.uses[slot] = use
        self._last = None

    def drop(self, slot: int) -> None:
        """Make a slot leave the layer as it is."""
        self.uses.pop(slot, None)
        self._last = None

    def plan(self, rows: BatchRows, x: Tensor) -> LayerPlan:
        """The plan for this batch: that of the step before, while the batch stays the same."""
        if self._last is None or self._last[:3] != (rows, len(x), x.dtype):
            plan = plan_layer(rows, self.uses, slices=len(self.B), tokens=len(x), dtype=x.dtype)
            self._last = rows, len(x), x.dtype, plan
        return self._last[3]


def project(
    x: Tensor,
    factors: LayerFactors,
    rows: BatchRows,
    *,
    product: Product,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """y [T, outputs] of x [T, inputs]: the base model's product, changed where a token's adapter is
    multiplicative.

    weight: W [outputs, inputs], called only where W * M is formed. Tokens of slots that the layer does not
    know are those of the base model. The rows of all ranks are multiplied by W together with the base's rows,
    so that W is read once; where a slot has so many tokens that forming W * M costs less
    (kernels/flora/cost_model.py), its tokens are multiplied by that.
    """
    plan = factors.plan(rows, x)
    if plan.expanded is None:
        y = _expanded(x, factors, plan, product=product, bias=bias)
    else:
        y = _partly_formed(x, factors, plan, product=product, weight=weight, bias=bias)
    if any(plan.added):
        sizes = [B.shape[2] for B in factors.B]
        parts = zip(y.split(sizes, dim=1), weight().split(sizes), plan.added, strict=True)
        for s, (of_slice, W, groups) in enumerate(parts):
            for group in groups:
                _add_deviations(of_slice, x, W, factors.A[s], factors.B[s], group)
    return y


def _partly_formed(
    x: Tensor,
    factors: LayerFactors,
    plan: LayerPlan,
    *,
    product: Product,
    weight: Callable[[], Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`project` where W * M is formed for some tokens."""
    assert plan.expanded is not None
    y = x.new_empty(len(x), sum(B.shape[2] for B in factors.B))
    if len(plan.expanded):
        y[plan.expanded] = _expanded(x[plan.expanded], factors, plan, product=product, bias=bias)
    sizes = [B.shape[2] for B in factors.B]
    parts = zip(y.split(sizes, dim=1), weight().split(sizes), plan.formed, strict=True)
    for s, (of_slice, W, groups) in enumerate(parts):
        for group in groups:
            of_slice[group.positions] = _formed(x[group.positions], W, factors.A[s], factors.B[s], group)
    if bias is not None:
        y[plan.formed_tokens] += bias
    return y


def _formed(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, group: FormedGroup) -> Tensor:
    """Products with W * M, [n, outputs]. A: [S, R, inputs], B: [S, R, outputs]."""
    if group.rank == 0:
        return linear(x, weight)
    if x.is_cpu:
        y = x.new_empty(len(x), len(weight))
        _multiply(y, x, weight, A, B, group=group, add=False)
        return y
    return flora_linear(
        x,
        weight,
        A[group.slots, : group.rank],
        B[group.slots, : group.rank].mT,
        offset=group.offset,
        segments=group.segments,
    )


def _add_deviations(y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, group: FormedGroup) -> None:
    """Add the products with W * (M - 1), in place. y: [T, outputs of the slice]; A: [S, R, inputs]; B: [S, R,
    outputs]."""
    if isinstance(group.positions, slice):
        _multiply(y[group.positions], x[group.positions], weight, A, B, group=group, add=True)
        return
    total = x.new_empty(group.segments.tokens, y.shape[1])
    _multiply(total, x[group.positions], weight, A, B, group=group, add=False)
    y.index_add_(0, group.positions, total)


def _multiply(
    y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, group: FormedGroup, add: bool
) -> None:
    """y [n, outputs] = x [n, inputs] by the weights of a group, on a CPU."""
    multiply_modulated(
        y,
        x,
        weight,
        A[group.slots, : group.rank],
        B[group.slots, : group.rank].mT,
        constant=group.offset,
        segments=group.segments,
        add=add,
    )


def _expanded(
    x: Tensor, factors: LayerFactors, plan: LayerPlan, *, product: Product, bias: Tensor | None
) -> Tensor:
    """`project` of the tokens whose ranks add rows."""
    if plan.by_slice:
        sizes = [B.shape[2] for B in factors.B]
        y = x.new_empty(len(x), sum(sizes))
        for s, (part, of_slice) in enumerate(zip(plan.slices, y.split(sizes, dim=1), strict=True)):
            products = product(_inputs(x, factors.A[s], part), s)
            of_slice.copy_(_outputs(products, factors.B[s], part, len(x)))
    else:
        part = plan.slices[0]
        products = product(_inputs(x, factors.A[0], part), None)
        y = _outputs(products, factors.B[0], part, len(x))
    if bias is not None:
        y += bias
    _scale_outputs(y, factors, plan)
    return y


def _inputs(x: Tensor, A: Tensor, part: SlicePlan) -> Tensor:
    """The rows to be multiplied: x [T, inputs] of the kept tokens, then A[k] * x. A: [S, R, inputs]."""
    if part.scaled_inputs is not None:
        positions, slots = part.scaled_inputs.positions, part.scaled_inputs.slots
        x = x.index_add(0, positions, x[positions] * A[slots, 0])
    if not part.groups:
        return x
    own = x if part.kept is None else x[part.kept]
    inputs = x.new_empty(len(own) + part.added, x.shape[1])
    inputs[: len(own)] = own
    start = len(own)
    for group in part.groups:
        stop = start + group.rows
        out = inputs[start:stop].view(group.count, group.rank, -1)
        torch.mul(x[group.tokens][:, None], A[group.slots, : group.rank], out=out)
        start = stop
    return inputs


def _outputs(products: Tensor, B: Tensor, part: SlicePlan, tokens: int) -> Tensor:
    """[T, outputs] from the products of `_inputs`. B: [S, R, outputs]."""
    if not part.groups:
        return products
    start = len(products) - part.added
    if part.kept is None:
        y = products[:start]
    else:
        y = products.new_zeros(tokens, products.shape[1])
        y[part.kept] = products[:start]
    for group in part.groups:
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


def _add_terms(y: Tensor, terms: Tensor, scales: Tensor) -> None:
    """Add the sum of terms * scales over the ranks, both [n, rank, outputs], to y [n, outputs].

    In half precision, the sum is rounded once.
    """
    if terms.dtype in (torch.bfloat16, torch.float16):
        terms = terms.float()
    y += terms.mul_(scales).sum(1)


def _scale_outputs(y: Tensor, factors: LayerFactors, plan: LayerPlan) -> None:
    """Multiply the outputs of the IA3s that scale them by 1 + B."""
    start = 0
    for part, B in zip(plan.slices, factors.B, strict=True):
        stop = start + B.shape[2]
        if part.scaled_outputs is not None:
            positions, slots = part.scaled_outputs.positions, part.scaled_outputs.slots
            of_slice = y[:, start:stop]
            of_slice.index_add_(0, positions, of_slice[positions] * B[slots, 0])
        start = stop
