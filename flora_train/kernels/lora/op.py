"""LoRA for a batch of adapters: the public op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.autocast import no_autocast
from flora_train.kernels.backend import runs_in_triton
from flora_train.kernels.lora.batched import SegmentedLora
from flora_train.kernels.lora.looped import LoopedLora
from flora_train.kernels.segments import Segments, check_order, check_shape, in_order

LONG_UNITS = 64
"""Tokens of a unit from which torch's batched matmuls are used instead of Triton: they need fewer launches
and no loop over adapters. Not calibrated (benchmarks/results/kernel_times_cuda.md has their times on an
H100)."""
SHORT_UNIT = 8
"""Tokens of a unit below which a copy of A and B for every unit is as much as the tokens are."""
FEW_UNITS = 128
"""Units up to which these copies are small."""
UNITS_OF_A_SEGMENT = 4
"""Units for each segment with tokens up to which a loop over segments saves nothing. Like the two numbers
above, not calibrated."""
FEW_TOKENS = 4
"""Tokens up to which a loop over their segments has no more operations than the batched form."""


def lora_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scaling: Sequence[float],
    segments: Segments,
    order: Tensor | None = None,
) -> Tensor:
    """y_t + scaling_k (x_t A_k^T) B_k^T for every token t of segment k; may overwrite y (see
    `lora_reference`).

    y: [T, out]; x: [T, in], cast to y's dtype; A: [K, r, in] and B: [K, out, r], float32 masters, cast to it
    as well; scaling: K numbers; segments: K segments of T tokens; order: LongTensor [T], the position of each
    grouped token in x and y, or None if they are grouped. Differentiable once, in y, x, A and B. Raises
    ValueError on shapes that do not agree.
    """
    K, rank = A.shape[:2]
    check_shape("y", y.shape, (segments.tokens, B.shape[1]))
    check_shape("x", x.shape, (segments.tokens, A.shape[2]))
    check_shape("A", A.shape, (len(segments), rank, x.shape[1]))
    check_shape("B", B.shape, (K, y.shape[1], rank))
    check_order(segments, order)
    # A module hook on the base layer makes y a view, which autograd does not allow to be changed in place.
    if y._is_view() or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    # Under autocast the base layer's output has another dtype than its input.
    x = x.to(y.dtype)
    with no_autocast(x):
        if runs_in_triton(x, rank) and segments.unit < LONG_UNITS:
            # Imported here, because triton is optional and slow to load.
            from flora_train.kernels.lora.triton_kernels import FusedLora

            return FusedLora.apply(y, x, A, B, scaling, segments, order)
        form = LoopedLora if is_looped(segments) else SegmentedLora
        if order is None and not torch.is_grad_enabled():
            if segments.tokens <= FEW_TOKENS:
                form = LoopedLora
            form.add(y, x, A, B, scaling, segments)
            return y
        return in_order(lambda y, x: form.apply(y, x, A, B, scaling, segments), order, y, x)


def is_looped(segments: Segments) -> bool:
    """Whether torch computes these segments one after the other instead of all units at once."""
    units = segments.tokens // segments.unit
    if segments.unit >= SHORT_UNIT or units <= FEW_UNITS:
        return False
    used = sum(length > 0 for length in segments.lengths)
    return units > UNITS_OF_A_SEGMENT * used
