"""IA3 for a batch of adapters: the public op."""

from __future__ import annotations

from torch import Tensor

from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.backend import runs_in_triton
from flora_train.kernels.ia3.batched import SegmentedScale
from flora_train.kernels.segments import Segments, check_order, check_shape, in_order


def ia3_scale(x: Tensor, scale: Tensor, segments: Segments, *, order: Tensor | None = None) -> Tensor:
    """x_t * scale_k for every token t of segment k (see `ia3_reference`).

    x: [T, d]; scale: [K, d] float32 masters; segments: K segments of T tokens; order: LongTensor [T], the
    position of each grouped token in x, or None if they are grouped. Returns [T, d] in x's dtype and order.
    Differentiable once, in x and scale. Raises ValueError on shapes that do not agree.
    """
    check_shape("x", x.shape, (segments.tokens, scale.shape[1]))
    check_shape("scale", scale.shape, (len(segments), x.shape[1]))
    check_order(segments, order)
    with no_autocast(x):
        if runs_in_triton(x):
            # Imported here, because triton is optional and slow to load.
            from flora_train.kernels.ia3.triton_kernels import FusedScale

            return FusedScale.apply(x, scale, segments, order)
        return in_order(lambda grouped: SegmentedScale.apply(grouped, scale, segments), order, x)
