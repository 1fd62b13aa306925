"""Noise on what a router reads in training."""

from __future__ import annotations

import torch
from torch import Tensor

from flora_train.adapters.routing import Routing, Span
from flora_train.adapters.seeds import seeded_generator


def jittered(x: Tensor, module: str, routing: Routing, span: Span, *, tokens_per_row: int) -> Tensor:
    """Tokens x [T, d] times random numbers between 1 - jitter and 1 + jitter, in rows with noise; x itself in
    evaluation.

    The numbers depend only on the row's noise, the adapter and the layer, as those of dropout do. The result
    is float32 where there are some: 16 bits would round most of them to 1.
    """
    experts = span.specs[0].experts
    if routing.noise is None or experts is None or not experts.jitter:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = torch.ones_like(x, dtype=wide)
    for k, first, end in span.segments:
        for row in range(first, end):
            noise = routing.noise[span.start + row]
            if noise is None:
                continue
            name = span.specs[k].seed_name
            generator = seeded_generator(noise.seed, name, f"{module} jitter", device=x.device)
            length = min(noise.length, tokens_per_row)
            uniform = torch.rand(length, x.shape[1], generator=generator, device=x.device)
            start = row * tokens_per_row
            factors[start : start + length] = (1.0 + experts.jitter * (2.0 * uniform - 1.0)).to(wide)
    return x.to(wide) * factors
