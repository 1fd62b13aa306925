"""Which formulation of fLoRA is fastest here? A plain function of numbers that one can print and test."""

from __future__ import annotations

from typing import Literal

Formulation = Literal["rank_expanded", "materialised", "grouped"]

# Forming W0 * M costs passes over W0 per segment, however few its tokens; expansion costs one run of the tokens through
# W0 per term: every rank, and one more for the base if some adapter is residual. benchmarks/layer.py measures both.
EXPAND_BELOW = 100
EXPAND_BELOW_HALF = 400  # half precision multiplies fast, forming W0 * M is as slow as ever


def choose_formulation(
    rank: int, residual: bool, tokens: int, segments: int, half: bool = False, device: str = "cpu"
) -> Formulation:
    """The formulation for `tokens` tokens in `segments` segments at `rank`; residual: some offset is not 0; half: W0 is
    bfloat16 or float16; device: torch's word for its type.

    One term alone, or terms x tokens per adapter below EXPAND_BELOW (_HALF), is faster expanded. Else W0 * M is formed: of
    one segment a thread on a CPU, of all at once elsewhere, where a loop over adapters would leave the device idle.
    """
    terms, tokens_per_adapter = rank + residual, tokens / max(segments, 1)
    limit = EXPAND_BELOW_HALF if half else EXPAND_BELOW
    if terms == 1 or terms * tokens_per_adapter < limit:
        return "rank_expanded"
    return "materialised" if device == "cpu" else "grouped"
