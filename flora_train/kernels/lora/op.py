"""LoRA for a batch of adapters: the public op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.backend import runs_in_triton
from flora_train.kernels.lora.batched import SegmentedLora
from flora_train.kernels.segments import Segments, check_layout, check_stack, in_order, within_ranks


def lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Sequence[float],
    segments: Segments,
    order: Tensor | None = None,
) -> Tensor:
    """y_t + scaling_k (x_t A_k^T) B_k^T for every token t of segment k; may overwrite y (see `lora_reference`).

    y: [T, out]; x: [T, in], cast to y's dtype; A: [K, r, in], B: [K, out, r], float32 masters, cast to it too;
    scaling: K numbers; segments: K segments of T tokens; order: LongTensor [T], where the tokens of the segments lie in x and
    y, if not one after the other. Differentiable in y, x, A and B, once. Raises ValueError on shapes that do not agree.
    """
    K, rank = A.shape[:2]
    check_stack("y", y.shape, (segments.tokens, B.shape[1]))
    check_stack("x", x.shape, (segments.tokens, A.shape[2]))
    check_stack("A", A.shape, (len(segments), rank, x.shape[1]))
    check_stack("B", B.shape, (K, y.shape[1], rank))
    check_layout(segments, rank, order)
    if y._is_view() or not y.is_contiguous():  # a module hook on the base layer makes it a view: autograd lets nobody write there
        y = y.clone(memory_format=torch.contiguous_format)
    x = x.to(y.dtype)  # under autocast the base layer's output has another type than its input
    with no_autocast(x):
        if runs_in_triton(x, rank) and segments.unit < LONG_ROWS:
            from flora_train.kernels.lora.triton_kernels import FusedLora  # loaded when it is first asked for

            return FusedLora.apply(y, x, A, B, scaling, segments, order)
        A, B = within_ranks(A, segments, dim=1), within_ranks(B, segments, dim=2)
        return in_order(lambda y, x: SegmentedLora.apply(y, x, A, B, scaling, segments), order, y, x)


LONG_ROWS = 64
"""Tokens of a row from which on torch's batched matmuls take the tokens, in fewer launches than ours and without a loop over
adapters. Not calibrated: what they cost on an H100 is in benchmarks/results/kernel_times_cuda.md, ours are not beside them."""
