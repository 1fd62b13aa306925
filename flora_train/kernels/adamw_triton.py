"""AdamW on selected rows of stacked tensors in Triton: one launch, which reads and writes every number of the
rows once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _adamw(
    values, gradients, first, second, slots, numbers, groups, size, beta1, beta2, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row; numbers[k]: clip factor, decay factor, -lr / (1 - beta1^t), sqrt(1 - beta2^t).

    WIDTH 8: in columns of group 1, numbers 4 and 5 are the decay factor and the rate instead; in columns of
    group 2, numbers 6 and 7.
    """
    k = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    index = tl.load(slots + k).to(tl.int64) * size + column
    gradient = tl.load(gradients + index, mask=mask, other=0.0) * tl.load(numbers + WIDTH * k)
    m, v = tl.load(first + index, mask=mask, other=0.0), tl.load(second + index, mask=mask, other=0.0)
    m += (1.0 - beta1) * (gradient - m)
    v = v * beta2 + (1.0 - beta2) * gradient * gradient
    decay, rate = tl.load(numbers + WIDTH * k + 1), tl.load(numbers + WIDTH * k + 2)
    if WIDTH == 8:
        group = tl.load(groups + column, mask=mask, other=0)
        decay = tl.where(group == 1, tl.load(numbers + WIDTH * k + 4), decay)
        rate = tl.where(group == 1, tl.load(numbers + WIDTH * k + 5), rate)
        decay = tl.where(group == 2, tl.load(numbers + WIDTH * k + 6), decay)
        rate = tl.where(group == 2, tl.load(numbers + WIDTH * k + 7), rate)
    value = tl.load(values + index, mask=mask, other=0.0) * decay
    value += m * rate / (tl.sqrt(v) / tl.load(numbers + WIDTH * k + 3) + eps)
    tl.store(first + index, m, mask=mask)
    tl.store(second + index, v, mask=mask)
    tl.store(values + index, value, mask=mask)


def fused_adamw(
    values: Tensor,
    gradients: Tensor,
    first: Tensor,
    *,
    second: Tensor,
    slots: Tensor,
    numbers: Tensor,
    groups: Tensor | None = None,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update the rows `slots` [K] int of values and moments (first, second), all [S, P] float32, by their
    gradients.

    numbers: [K, 4] float32, row k for slots[k]: clip factor, decay factor, -lr / (1 - beta1^t), sqrt(1 -
    beta2^t). groups: [P] uint8, the group of each column; then numbers is [K, 8], with decay factor and rate
    of group 1 and of group 2.
    """
    size, width = values.shape[1], 4 if groups is None else 8
    with torch.cuda.device_of(values):
        _adamw[(len(slots), triton.cdiv(size, BLOCK))](
            values, gradients, first, second, slots, numbers, slots if groups is None else groups, size,
            *betas, eps, WIDTH=width, BLOCK=BLOCK,
        )  # fmt: skip
