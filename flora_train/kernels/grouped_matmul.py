"""Products of groups of tokens with a matrix for each group, without padding.

Dimensions: P tokens, G groups (segments of tokens, some empty), d and d' features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flora_train.kernels.autocast import as_linear_casts, autocast_disabled, no_autocast
from flora_train.kernels.segments import Segments, check_shape


class GroupedMatmul(torch.autograd.Function):
    """y_t = x_t W_g for every token t of group g, one group after the other. Shapes as `grouped_matmul`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, segments: Segments) -> Tensor:
        # Tokens are kept for the gradient of weights alone: those of a base are frozen.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights)
        ctx.segments, ctx.width = segments, x.shape[1]
        y = x.new_empty(segments.tokens, weights.shape[2])
        for g, start, end in segments:
            torch.mm(x[start:end], weights[g], out=y[start:end])
        return y

    @staticmethod
    @once_differentiable
    @autocast_disabled
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights = ctx.saved_tensors
        dx: Tensor | None = None
        dweights: Tensor | None = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_empty(len(dy), ctx.width)
            for g, start, end in ctx.segments:
                torch.mm(dy[start:end], weights[g].T, out=dx[start:end])
        if ctx.needs_input_grad[1]:
            dweights = weights.new_zeros(weights.shape)
            for g, start, end in ctx.segments:
                torch.mm(x[start:end].T, dy[start:end], out=dweights[g])
        return dx, dweights, None


def grouped_matmul(x: Tensor, weights: Tensor, segments: Segments) -> Tensor:
    """x_t W_g for every token t of group g.

    x: [P, d]; weights: [G, d, d'] in x's dtype, with any strides; segments: G groups of P tokens. Returns [P,
    d'] in x's dtype. Differentiable once, in x and weights. Raises ValueError on shapes that do not agree.
    """
    check_shape("x", x.shape, (segments.tokens, weights.shape[1]))
    check_shape("weights", weights.shape[:1], (len(segments),))
    return GroupedMatmul.apply(x, weights, segments)


def grouped_linear(x: Tensor, weights: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    """The linear layer of each token's expert: x_t W_e^T + b_e for every token t of expert e.

    x: [P, in]; weights: [E, out, in], frozen, with any strides (under autocast both are cast as F.linear
    casts them); bias: [E, out] or None; segments: E experts of P tokens. Returns [P, out], a tensor of its
    own. Differentiable once, in x.
    """
    x, weights = as_linear_casts(x, weights)
    with no_autocast(x):
        y = grouped_matmul(x, weights.mT, segments)
        if bias is None:
            return y
        lengths = torch.tensor(segments.lengths, device=x.device)
        return y + bias.to(y.dtype).repeat_interleave(lengths, dim=0, output_size=segments.tokens)
