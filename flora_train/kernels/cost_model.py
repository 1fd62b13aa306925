"""Which formulation of fLoRA is fastest here? A plain function of numbers that one can print and test.

Its thresholds are measured: benchmarks/calibrate.py writes thresholds.json, which says where and when.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

Formulation = Literal["rank_expanded", "materialised", "grouped", "fused", "scaled"]


@dataclass(frozen=True)
class Thresholds:
    """expand_below: terms x tokens per adapter, below which running the tokens through W0 once per term beats forming W0 * M,
    which costs passes over W0 per segment, however few its tokens. grouped_bytes: of all adapters' W0 * M at one time, up to
    which a CPU works on all of them at once: beyond, they no longer stay in its cache."""

    expand_below: int
    grouped_bytes: int


@dataclass(frozen=True)
class Work:
    """tokens in `segments` segments, all of one length if `even`, through W0 [out_features, in_features] of `bytes_each`
    bytes a number; residual: some offset is not 0; split: M - 1 is kept apart from 1 (kernels/backend.py); device: torch's
    word for its type; triton: our own kernels were chosen."""

    rank: int
    residual: bool
    tokens: int
    segments: int
    in_features: int
    out_features: int
    even: bool = True
    bytes_each: int = 4
    split: bool = False
    device: str = "cpu"
    triton: bool = False

    @property
    def terms(self) -> int:
        """Runs of the tokens through W0 that an expansion takes: every rank, and the base where it is apart."""
        return self.rank + (self.residual or self.split)


class Decision(NamedTuple):
    formulation: Formulation
    why: str


def choose_formulation(work: Work) -> Formulation:
    """The fastest formulation of fLoRA for this work."""
    return decide(work, thresholds_for(work)).formulation


@lru_cache(maxsize=4096)
def decide(work: Work, thresholds: Thresholds) -> Decision:
    """The fastest formulation of fLoRA for this work, and why.

    One term alone, or few tokens per adapter, is faster expanded. Else W0 * M is formed: a tile at a time in Triton; in
    torch on a CPU of one segment a thread, or of all at once while they are small; elsewhere always of all at once, because
    a loop over adapters would leave the device idle.
    """
    if work.terms == 1:
        why = "one term: the tokens of all adapters go through W0 once, between two scales"
        return Decision("scaled" if work.triton else "rank_expanded", why)
    each = work.tokens / max(work.segments, 1)
    if work.terms * each < thresholds.expand_below:
        why = f"{work.terms} terms x {each:.0f} tokens per adapter < {thresholds.expand_below}: too few to form W0 * M for"
        return Decision("rank_expanded", why)
    enough = f"{work.terms} terms x {each:.0f} tokens per adapter >= {thresholds.expand_below}"
    if work.triton:
        return Decision("fused", f"{enough}: W0 * M is formed a tile at a time, in registers")
    if work.device != "cpu":
        return Decision("grouped", f"{enough}, and no loop over adapters on a {work.device} device")
    at_once = work.segments * work.out_features * work.in_features * work.bytes_each
    if work.even and work.segments > 1 and at_once <= thresholds.grouped_bytes:
        return Decision("grouped", f"{enough}, and all W0 * M together are {_mib(at_once)} <= {_mib(thresholds.grouped_bytes)}")
    reason = f"all W0 * M together are {_mib(at_once)} > {_mib(thresholds.grouped_bytes)}"
    if at_once <= thresholds.grouped_bytes:
        reason = "there is one adapter" if work.segments == 1 else "segments differ in length"
    return Decision("materialised", f"{enough}, and {reason}")


def thresholds_for(work: Work) -> Thresholds:
    """Those of this device and size of number, or of the nearest that is known."""
    known = _calibration()["thresholds"]
    of_device = known.get(work.device, known["cuda"])
    return _thresholds(*of_device.get(str(work.bytes_each), of_device["4"]).values())


def calibrated_on(device: str) -> str | None:
    """Machine and versions on which this device's thresholds were measured; None: they are its nearest neighbour's."""
    return _calibration()["measured_on"].get(device)


@lru_cache(maxsize=64)
def _thresholds(expand_below: int, grouped_bytes: int) -> Thresholds:
    return Thresholds(expand_below, grouped_bytes)


@lru_cache(maxsize=1)
def _calibration() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("thresholds.json").read_text(encoding="utf-8"))


def _mib(number: float) -> str:
    return f"{number / 2**20:.0f} MiB"
