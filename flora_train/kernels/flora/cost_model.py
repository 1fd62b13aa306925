"""Chooses the fastest formulation of fLoRA: a pure function of numbers that can be printed and tested.

Its thresholds are measured: benchmarks/calibrate.py writes thresholds.json, which records the machine and the
date.
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
    """Measured costs of one device. The unit of cost is one token that is multiplied by W0."""

    expanding: int
    """Percent: the cost of a token through W0 as a term of an expansion, with the products around it."""
    forming: int
    """The cost of forming W0 * M for one adapter, whatever its tokens: passes over W0."""
    forming_a_rank: int
    """The same for every rank: thin matmuls."""
    grouped_bytes: int
    """Size of W0 * M of all adapters up to which a CPU computes them together: beyond, they do not stay in
    its cache."""
    fused_tokens: int = 1 << 20
    """Tokens per adapter up to which the Triton kernel is faster than forming W0 * M and calling the GPU's
    matmul library."""


@dataclass(frozen=True)
class Work:
    """The work of one layer: tokens in segments through W0 [out_features, in_features]."""

    rank: int
    residual: bool
    """Whether some offset is not 0."""
    tokens: int
    segments: int
    in_features: int
    out_features: int
    even: bool = True
    """Whether all segments have the same length."""
    bytes_each: int = 4
    """Bytes of one number."""
    split: bool = False
    """Whether M - 1 is computed separately from 1 (kernels/backend.py)."""
    device: str = "cpu"
    """torch's device type."""
    triton: bool = False
    """Whether the Triton kernels are selected."""

    @property
    def tokens_per_adapter(self) -> float:
        return self.tokens / max(self.segments, 1)

    @property
    def terms(self) -> int:
        """How often an expansion multiplies the tokens by W0: once per rank, and once for the base if it is
        separate."""
        return self.rank + (self.residual or self.split)


class Decision(NamedTuple):
    """A formulation, and the reason for it in one line."""

    formulation: Formulation
    reason: str


def choose_formulation(work: Work) -> Formulation:
    """The fastest formulation of fLoRA for this work."""
    return decide(work, thresholds_for(work)).formulation


@lru_cache(maxsize=4096)
def decide(work: Work, thresholds: Thresholds) -> Decision:
    """The fastest formulation of fLoRA for this work, and the reason.

    An expansion multiplies every token by W0 once per term, forward and backward. With W0 * M it is
    multiplied three times (four if split), after M was formed. One term, or few tokens per adapter, is faster
    expanded. Triton forms W0 * M a tile at a time. Torch on a CPU forms it for one segment per thread, or for
    all at once while they are small; elsewhere always for all at once, because a loop over adapters would
    leave the device idle.
    """
    if work.terms == 1:
        reason = "one term: the tokens of all adapters are multiplied by W0 once, between two scales"
        return Decision("scaled" if work.triton else "rank_expanded", reason)
    tokens = work.tokens_per_adapter
    expanded = 2 * work.terms * tokens * thresholds.expanding / 100
    formed = (3 + work.split) * tokens + thresholds.forming + thresholds.forming_a_rank * work.rank
    terms = f"{work.terms} terms cost {expanded:.0f} runs through W0"
    costs = f"for {tokens:.0f} tokens, {terms} and forming W0 * M {formed:.0f}"
    if expanded < formed:
        return Decision("rank_expanded", costs)
    if work.triton and (tokens <= thresholds.fused_tokens or not work.even):
        return Decision("fused", f"{costs}; W0 * M is formed a tile at a time, in registers")
    if work.device != "cpu":
        return Decision("grouped", f"{costs}; on a {work.device} device without a loop over adapters")
    total_bytes = work.segments * work.out_features * work.in_features * work.bytes_each
    size, limit = _mib(total_bytes), _mib(thresholds.grouped_bytes)
    if total_bytes > thresholds.grouped_bytes:
        return Decision("materialised", f"{costs}; all W0 * M together are {size} > {limit}")
    if work.segments == 1:
        return Decision("materialised", f"{costs}; there is one adapter")
    if not work.even:
        return Decision("materialised", f"{costs}; segments differ in length")
    return Decision("grouped", f"{costs}; all W0 * M together are {size} <= {limit}")


def thresholds_for(work: Work) -> Thresholds:
    """The thresholds of this device and number size, or of the nearest that were measured."""
    measured = _calibration()["thresholds"]
    by_size = measured.get(device_name(work), measured["cuda"])
    values = by_size.get(str(work.bytes_each), by_size["4"])
    return _thresholds(**values)


def device_name(work: Work) -> str:
    """The key of the thresholds: the device type, and whether Triton forms W0 * M."""
    return f"{work.device}, triton" if work.triton else work.device


def calibrated_on(work: Work) -> str | None:
    """Machine and versions on which the thresholds for this work were measured; None if they are another
    device's."""
    return _calibration()["measured_on"].get(device_name(work))


@lru_cache(maxsize=64)
def _thresholds(**values: int) -> Thresholds:
    return Thresholds(**values)


@lru_cache(maxsize=1)
def _calibration() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("thresholds.json").read_text(encoding="utf-8"))


def _mib(number: float) -> str:
    return f"{number / 2**20:.0f} MiB"
