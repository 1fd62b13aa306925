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
from flora_train.kernels.segments import Segments, check_order, check_shape, in_order

TORCH_FORMULATIONS: dict[Formulation, Any] = {
    "rank_expanded": RankExpandedFlora,
    "materialised": MaterialisedFlora,
    "grouped": GroupedFlora,
}
TRITON_FORMULATIONS = ("fused", "scaled")


def flora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    offset: Sequence[float],
    segments: Segments,
    order: Tensor | None = None,
) -> Tensor:
    """y_t = x_t (W0 * (offset_k + B_k A_k))^T for every token t of segment k (see `flora_reference`).

    x: [T, in] float32, bfloat16, float16 or float64; weight: [out, in] in x's dtype, frozen (under autocast
    both are cast as F.linear casts them); A: [K, r, in] and B: [K, out, r], float32 masters (or x's dtype);
    offset: K numbers, 0 pure or 1 residual; segments: K segments of T tokens; order: LongTensor [T], the
    position of each grouped token in x, or None if they are grouped. Returns [T, out] in x's dtype and order.
    Differentiable once, in x, A and B. Raises ValueError on shapes that do not agree.
    """
    K, rank = A.shape[:2]
    check_shape("x", x.shape, (segments.tokens, weight.shape[1]))
    check_shape("A", A.shape, (len(segments), rank, weight.shape[1]))
    check_shape("B", B.shape, (K, weight.shape[0], rank))
    check_order(segments, order)
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
        if chosen in TRITON_FORMULATIONS:
            return apply(x, weight, A, B, offset, segments, work.split, order)
        return in_order(lambda grouped: apply(grouped, weight, A, B, offset, segments, work.split), order, x)


def formulation(name: Formulation) -> Any:
    """The implementation. Its `apply` takes (x, weight, A, B, offset, segments, split), and in Triton `order`
    after them."""
    if name in TRITON_FORMULATIONS:
        # Imported here, because triton is optional and slow to load.
        from flora_train.kernels.flora.triton_op import FusedFlora, ScaledFlora

        return FusedFlora if name == "fused" else ScaledFlora
    return TORCH_FORMULATIONS[name]
