"""The shares of a step's time: data, frozen base, adapters, loss, optimizer, exchange between processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PARTS = ("base", "adapters", "loss", "optimizer", "exchange", "data")


class StepTimer:
    """Seconds per part over the timed steps: all steps on a CPU; on a GPU one in `sample_every`, because
    timing a part means waiting for it.

    `data`, `loss`, `optimizer` and `exchange` are timed where they happen. The rest of a step is the model's
    forward and backward. The part of the frozen base is estimated, by padded tokens, from one micro-batch
    that ran without adapters (`base_rate`); `adapters` is the remainder.
    """

    def __init__(self, device: torch.device, sample_every: int) -> None:
        self.device = device
        self.sample_every = 1 if device.type == "cpu" else sample_every
        self.seconds: dict[str, float] = defaultdict(float)
        self.padded_tokens = 0
        self.base_rate: float | None = None
        """Seconds per padded token of the base's forward and backward."""
        self._running = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time step `number`, if it is one of the timed steps."""
        self._running = number % self.sample_every == 0
        try:
            with self.part("step"):
                yield
        finally:
            self._running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a part of the running step. Outside of a step, as in an evaluation, nothing is timed."""
        if not self._running:
            yield
            return
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    def time_base(self, base_pass: Callable[[], None], padded_tokens: int) -> None:
        """Measure `base_rate`, without a change to the times of the steps. base_pass: forward and backward of
        the base over `padded_tokens`.
        """
        seconds, steps = [], dict(self.seconds)
        for _ in range(2):  # the first pass also allocates memory
            started, loss_before = self.now(), self.seconds["loss"]
            with self.step(0):
                base_pass()
            seconds.append(self.now() - started - (self.seconds["loss"] - loss_before))
        self.seconds.clear()
        self.seconds.update(steps)
        self.base_rate = min(seconds) / padded_tokens

    def count_tokens(self, padded_tokens: int) -> None:
        """Add a micro-batch to the running step."""
        if self._running:
            self.padded_tokens += padded_tokens

    def now(self) -> float:
        """Seconds on a monotonic clock, after the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def shares(self) -> dict[str, float]:
        """Part -> its share of the timed steps; empty before the base was timed."""
        if self.base_rate is None or not self.seconds["step"]:
            return {}
        spent = {name: self.seconds[name] for name in PARTS if name not in ("base", "adapters")}
        model = self.seconds["step"] - sum(spent.values())
        base = min(model, self.base_rate * self.padded_tokens)
        spent |= {"base": base, "adapters": model - base}
        return {
            name: spent[name] / self.seconds["step"] for name in PARTS if spent[name] or name != "exchange"
        }


def format_shares(shares: dict[str, float]) -> str:
    """`base 61 %, adapters 24 %, ...`."""
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
