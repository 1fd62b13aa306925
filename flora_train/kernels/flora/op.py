"""fLoRA for a batch of adapters: the public op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flora_train.kernels.autocast import as_linear_casts, no_autocast
from flora_train.kernels.backend import runs_in_triton, splits
from flora_train.kernels.flora.cost_model import Formulation, Work, choose_formulation
from flora_train.kernels.flora.grouped import GroupedFlora
from flora_train.kernels.flora.materialised import MaterialisedFlora, RankExpandedFlora
from flora_train.kernels.segments import Segments, check_layout, check_stack, in_order, within_ranks


def flora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offset: Sequence[float],
    segments: Segments,
    order: Tensor | None = None,
) -> Tensor:
    """y_t = x_t (W0 * (offset_k + B_k A_k))^T for every token t of segment k (see `flora_reference`).

    x: [T, in] float32, bfloat16, float16 or float64; weight: [out, in] in x's dtype, frozen (under autocast both are cast as
    F.linear casts them); A: [K, r, in] and B: [K, out, r] float32 masters (or x's dtype); offset: K numbers, 0 pure or
    1 residual; segments: K segments of T tokens; order: LongTensor [T], where the tokens of the segments lie in x, if not one
    after the other. Returns [T, out] in x's dtype, in x's order. Differentiable in x, A and B, once.
    Raises ValueError on shapes that do not agree.
    """
    K, rank = A.shape[:2]
    check_stack("x", x.shape, (segments.tokens, weight.shape[1]))
    check_stack("A", A.shape, (len(segments), rank, weight.shape[1]))
    check_stack("B", B.shape, (K, weight.shape[0], rank))
    check_layout(segments, rank, order)
    x, weight = as_linear_casts(x, weight)
    work = Work(
        rank=rank,
        residual=any(offset),
        tokens=segments.tokens,
        segments=len(segments),
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        even=segments.even,
        bytes_each=weight.element_size(),
        split=splits(x.dtype),
        device=x.device.type,
        triton=runs_in_triton(x, rank),
    )
    chosen = choose_formulation(work)
    apply = formulation(chosen).apply
    with no_autocast(x):
        if chosen in IN_TRITON:
            return apply(x, weight, A, B, offset, segments, work.split, order)
        A, B = within_ranks(A, segments, dim=1), within_ranks(B, segments, dim=2)
        return in_order(lambda grouped: apply(grouped, weight, A, B, offset, segments, work.split), order, x)


IN_TRITON = ("fused", "scaled")


def formulation(name: Formulation) -> Any:
    """The implementation: its `apply` takes what `flora_linear` takes and `split`; Triton's take `order` after it, and are
    loaded when they are first asked for."""
    if name in IN_TRITON:
        from flora_train.kernels.flora.triton_op import FusedFlora, ScaledFlora

        return FusedFlora if name == "fused" else ScaledFlora
    return FORMULATIONS[name]


FORMULATIONS: dict[Formulation, Any] = {
    "rank_expanded": RankExpandedFlora,
    "materialised": MaterialisedFlora,
    "grouped": GroupedFlora,
}
"""Those in torch."""
