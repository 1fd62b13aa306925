"""Which formulation of fLoRA is fastest here? A plain function of numbers that one can print and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Formulation = Literal["rank_expanded", "materialised", "grouped", "fused"]

# Forming W0 * M costs passes over W0 per segment, however few its tokens; expansion costs one run of the tokens through
# W0 per term: every rank, and one more for the base if some adapter is residual. benchmarks/layer.py measures both.
EXPAND_BELOW = 100
EXPAND_BELOW_HALF = 400  # half precision multiplies fast, forming W0 * M is as slow as ever


GROUPED_BYTES = 12 << 20
"""Of all adapters' W0 * M at one time, up to which a CPU works on all at once: beyond, they no longer stay in its cache."""


@dataclass(frozen=True)
class Work:
    """tokens in `segments` segments, all of one length if `even`, through W0 [out_features, in_features] of `bytes_each`
    bytes a number; residual: some offset is not 0; device: torch's word for its type; triton: kernels/backend.py chose it."""

    rank: int
    residual: bool
    tokens: int
    segments: int
    in_features: int
    out_features: int
    even: bool = True
    bytes_each: int = 4
    device: str = "cpu"
    triton: bool = False


def choose_formulation(work: Work) -> Formulation:
    """The fastest formulation of fLoRA for this work.

    One term alone, or terms x tokens per adapter below EXPAND_BELOW (_HALF), is faster expanded. Else W0 * M is formed: on
    a CPU of one segment a thread, or of all at once while they are small; elsewhere always of all at once, because a loop
    over adapters would leave the device idle. Triton forms it a tile at a time, whatever the numbers.
    """
    terms, tokens_per_adapter = work.rank + work.residual, work.tokens / max(work.segments, 1)
    half = work.bytes_each == 2
    if work.triton and terms > 1:
        return "fused"
    if terms == 1 or terms * tokens_per_adapter < (EXPAND_BELOW_HALF if half else EXPAND_BELOW):
        return "rank_expanded"
    all_at_once = work.segments * work.out_features * work.in_features * work.bytes_each
    small = work.even and not half and work.segments > 1 and all_at_once <= GROUPED_BYTES
    return "grouped" if work.device != "cpu" or small else "materialised"
