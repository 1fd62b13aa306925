"""LoRA for a batch of adapters: the public op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.backend import runs_in_triton
from flora_train.kernels.lora_torch import SegmentedLora
from flora_train.kernels.segments import Segments, check_stack


def lora_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: Sequence[float], segments: Segments) -> Tensor:
    """y_t + scaling_k (x_t A_k^T) B_k^T for every token t of segment k; overwrites y (see `lora_reference`).

    y: [T, out], x: [T, in] of one dtype; A: [K, r, in], B: [K, out, r], float32 masters, cast to x's dtype;
    scaling: K numbers; segments: K segments of T tokens. Differentiable in y, x, A and B, once.
    Raises ValueError on shapes that do not agree.
    """
    K, rank = A.shape[:2]
    check_stack("y", y.shape, (segments.tokens, B.shape[1]))
    check_stack("x", x.shape, (segments.tokens, A.shape[2]))
    check_stack("A", A.shape, (len(segments), rank, x.shape[1]))
    check_stack("B", B.shape, (K, y.shape[1], rank))
    if y._is_view() or not y.is_contiguous():  # a module hook on the base layer makes it a view: autograd lets nobody write there
        y = y.clone(memory_format=torch.contiguous_format)
    return implementation(x).apply(y, x, A, B, scaling, segments)


def implementation(x: Tensor) -> type[torch.autograd.Function]:
    """Torch's operators or our own kernels, for tokens like x. Triton is loaded when it is first asked for."""
    if runs_in_triton(x):
        from flora_train.kernels.lora_triton import FusedLora

        return FusedLora
    return SegmentedLora
