"""One linear layer with adapters for the layer benchmarks: tensors of a shape, timing, and a line on the
machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)

# isort: split
import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.kernels.segments import Segments
from flora_train.runtime.environment import environment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PURE, RESIDUAL = 0.0, 1.0
IN_A_ROW = 4 if DEVICE.type == "cuda" else 1
"""Runs that are timed together: a GPU computes one while Python launches the next, as in a model."""


class Problem:
    """d: features in and out; `tokens` of `adapters` adapters, an equal share each, of one rank; deviation:
    mean |B A|."""

    def __init__(
        self, d: int, tokens: int, adapters: int, rank: int, dtype: torch.dtype, deviation: float = 0.1
    ) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=DEVICE)

        self.adapters = adapters
        self.segments = Segments(tuple(range(0, tokens + 1, tokens // adapters)))
        self.x, self.weight = random(tokens, d).to(dtype).requires_grad_(), (random(d, d) / d**0.5).to(dtype)
        self.dy = random(tokens, d).to(dtype)
        self.A = random(adapters, rank, d).requires_grad_()
        self.B = (deviation * random(adapters, d, rank)).requires_grad_()

    def frozen(self) -> Tensor:
        return F.linear(self.x, self.weight)

    def numbers(self, value: float) -> list[float]:
        """The same number for every adapter."""
        return [value] * self.adapters

    def ratio(self, forward: Callable[[Problem], Tensor], repeats: int, most_seconds: float = 8.0) -> float:
        """Forward + backward as a multiple of the frozen layer's: the median over interleaved pairs."""

        def timed(forward: Callable[[Problem], Tensor]) -> float:
            return seconds(lambda: [forward(self).backward(self.dy) for _ in range(IN_A_ROW)])

        ends = time.perf_counter() + most_seconds
        for warm in (
            forward,
            forward,
            Problem.frozen,
        ):  # twice: the first call asks the system for its memory
            timed(warm)
        ratios: list[float] = []
        while len(ratios) < repeats and (not ratios or time.perf_counter() < ends):
            ratios.append(timed(forward) / timed(Problem.frozen))
        return statistics.median(ratios)


def seconds(run: Callable[[], object]) -> float:
    """Seconds until the device has finished `run`."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def where() -> str:
    """Machine and versions."""
    facts = environment()
    machine = facts.machine
    device = machine.gpu if DEVICE.type == "cuda" else f"{machine.processor}, {machine.threads} threads"
    return f"{device}, torch {facts.packages['torch']}, Python {facts.python}"
