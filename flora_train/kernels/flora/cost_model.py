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
    """expanding: what a run of tokens through W0 costs as a term of an expansion, with the products around it, in percent of a
    run alone. forming, forming_a_rank: what forming W0 * M costs an adapter, however few its tokens, in tokens that go through W0 once:
    passes over W0, and thin matmuls for every rank. grouped_bytes: of all adapters' W0 * M at one time, up to which a CPU
    works on all of them at once: beyond, they no longer stay in its cache. fused_tokens: per adapter, up to which our own kernel
    is faster than W0 * M formed as a whole and the matmuls of the GPU's own library."""

    expanding: int
    forming: int
    forming_a_rank: int
    grouped_bytes: int
    fused_tokens: int = 1 << 20


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
    def each(self) -> float:
        """Tokens per adapter."""
        return self.tokens / max(self.segments, 1)

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

    An expansion takes every token through W0 once a term, forward and backward; with W0 * M it goes through W0 three times
    (four if split), after M was formed. One term alone, or few tokens per adapter, is faster expanded. W0 * M is formed a tile
    at a time in Triton; in torch on a CPU of one segment a thread, or of all at once while they are small; elsewhere always of
    all at once, because a loop over adapters would leave the device idle.
    """
    if work.terms == 1:
        why = "one term: the tokens of all adapters go through W0 once, between two scales"
        return Decision("scaled" if work.triton else "rank_expanded", why)
    expanded = 2 * work.terms * work.each * thresholds.expanding / 100
    formed = (3 + work.split) * work.each + thresholds.forming + thresholds.forming_a_rank * work.rank
    costs = f"for {work.each:.0f} tokens, {work.terms} terms cost {expanded:.0f} runs through W0 and forming W0 * M {formed:.0f}"
    if expanded < formed:
        return Decision("rank_expanded", costs)
    if work.triton and (work.each <= thresholds.fused_tokens or not work.even):
        return Decision("fused", f"{costs}; W0 * M is formed a tile at a time, in registers")
    if work.device != "cpu":
        return Decision("grouped", f"{costs}; on a {work.device} device without a loop over adapters")
    at_once = work.segments * work.out_features * work.in_features * work.bytes_each
    if work.even and work.segments > 1 and at_once <= thresholds.grouped_bytes:
        return Decision("grouped", f"{costs}; all W0 * M together are {_mib(at_once)} <= {_mib(thresholds.grouped_bytes)}")
    reason = f"all W0 * M together are {_mib(at_once)} > {_mib(thresholds.grouped_bytes)}"
    if at_once <= thresholds.grouped_bytes:
        reason = "there is one adapter" if work.segments == 1 else "segments differ in length"
    return Decision("materialised", f"{costs}; {reason}")


def thresholds_for(work: Work) -> Thresholds:
    """Those of this device and size of number, or of the nearest that is known."""
    known = _calibration()["thresholds"]
    of_device = known.get(place_of(work), known["cuda"])
    numbers = of_device.get(str(work.bytes_each), of_device["4"])
    return _thresholds(**numbers)


def place_of(work: Work) -> str:
    """The name of its thresholds: the device, and whether torch or our own kernels form W0 * M there."""
    return f"{work.device}, triton" if work.triton else work.device


def calibrated_on(work: Work) -> str | None:
    """Machine and versions on which the thresholds for this work were measured; None: they are a CPU's."""
    return _calibration()["measured_on"].get(place_of(work))


@lru_cache(maxsize=64)
def _thresholds(**numbers: int) -> Thresholds:
    return Thresholds(**numbers)


@lru_cache(maxsize=1)
def _calibration() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("thresholds.json").read_text(encoding="utf-8"))


def _mib(number: float) -> str:
    return f"{number / 2**20:.0f} MiB"
