"""How long is what an encoder hears of a clip? The clip, and silence up to a whole number of steps: in samples, and in positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flora_train.data.audio.decode import RATE

GRAIN = 320
"""Samples that a window is a multiple of: 20 ms, one position of Whisper's encoder (two frames of 10 ms that a convolution joins)."""


@dataclass(frozen=True)
class Windows:
    """longest: samples of the longest window; step: seconds (None: every window is the longest); positions: how many positions the
    encoder makes of so many samples."""

    longest: int
    step: float | None
    positions: Callable[[int], int]

    def samples(self, seconds: float) -> int:
        """Of the window of a clip that is so long: a function of the clip alone."""
        if self.step is None:
            return self.longest
        padded = max(1, math.ceil(seconds / self.step - 1e-9)) * self.step
        return min(self.longest, math.ceil(padded * RATE / GRAIN - 1e-9) * GRAIN)
