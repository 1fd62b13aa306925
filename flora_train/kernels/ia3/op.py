"""IA3 for a batch of adapters: the public op."""

from __future__ import annotations

from torch import Tensor

from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.backend import runs_in_triton
from flora_train.kernels.ia3.batched import SegmentedScale
from flora_train.kernels.segments import Segments, check_layout, check_stack, in_order


def ia3_scale(x: Tensor, scale: Tensor, segments: Segments, order: Tensor | None = None) -> Tensor:
    """x_t * scale_k for every token t of segment k (see `ia3_reference`).

    x: [T, d]; scale: [K, d] float32 masters; segments: K segments of T tokens; order: LongTensor [T], where the tokens of the
    segments lie in x, if not one after the other. Returns [T, d] in x's dtype and order. Differentiable in x and scale, once.
    Raises ValueError on shapes that do not agree.
    """
    check_stack("x", x.shape, (segments.tokens, scale.shape[1]))
    check_stack("scale", scale.shape, (len(segments), x.shape[1]))
    check_layout(segments, 1, order)
    with no_autocast(x):
        if runs_in_triton(x):
            from flora_train.kernels.ia3.triton_kernels import FusedScale  # loaded when it is first asked for

            return FusedScale.apply(x, scale, segments, order)
        return in_order(lambda grouped: SegmentedScale.apply(grouped, scale, segments), order, x)
