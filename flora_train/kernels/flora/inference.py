"""x (W0 * (c + B A))^T on a CPU, without gradients: for servers, whose threads wait busily for the next
matmul.

All threads compute one segment after the other. Threads of their own for every segment, as in training
(materialised.py), would compete with the waiting ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.kernels.cpu_threads import SCRATCH
from flora_train.kernels.segments import Segments


def multiply_modulated(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    constant: Sequence[float],
    segments: Segments,
    add: bool,
) -> None:
    """y_t = x_t (W0 * (c_k + B_k A_k))^T for every token t of segment k, in place.

    y: [T, out]; x: [T, in]; weight: [out, in]; A: [K, r, in]; B: [K, out, r]; all of one dtype, in which
    W0 * (c + B A) is rounded; constant: K numbers c_k; add: add to y.
    """
    if any(constant):  # as one more rank, so that the sum is rounded once
        ones = B.new_ones(*B.shape[:2], 1)
        constants = A.new_tensor(constant)[:, None, None].expand(-1, 1, A.shape[2])
        A, B = torch.cat([A, constants], dim=1), torch.cat([B, ones], dim=2)
    modulated = SCRATCH.matrix("weight", (weight.shape[0], weight.shape[1]), weight)
    for k, start, end in segments:
        torch.mm(B[k], A[k], out=modulated).mul_(weight)
        y[start:end].addmm_(x[start:end], modulated.T, beta=float(add))
