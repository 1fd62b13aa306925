"""LoRA in torch for many segments of any lengths, such as the tokens of every expert of a mixture.

Where segments have no common unit of several tokens, `batched.py` would copy A and B for almost every token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flora_train.kernels.grouped_matmul import grouped_matmul
from flora_train.kernels.segments import Segments, per_segment

SHORT_UNIT = 8
"""Tokens of a unit below which a copy of A and B for every unit is as much as the tokens are. Not
calibrated."""
FEW_UNITS = 128
"""Units up to which those copies are small."""
UNITS_OF_A_SEGMENT = 4
"""Units for each segment with tokens up to which a loop over segments saves nothing."""


def is_scattered(segments: Segments) -> bool:
    """Whether a loop over segments is better than copies of A and B for every unit."""
    units = segments.tokens // segments.unit
    if segments.unit >= SHORT_UNIT or units <= FEW_UNITS:
        return False
    used = sum(length > 0 for length in segments.lengths)
    return units > UNITS_OF_A_SEGMENT * used


def grouped_lora(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, *, scaling: Sequence[float], segments: Segments
) -> Tensor:
    """y_t + scaling_k (x_t A_k^T) B_k^T. Shapes as `lora_add`; y is not changed."""
    hidden = grouped_matmul(x, A.to(x.dtype).mT, segments)
    scaled = (B * per_segment(scaling, B)).to(x.dtype)
    return y + grouped_matmul(hidden, scaled.mT, segments)
