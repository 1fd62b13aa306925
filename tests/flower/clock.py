"""A clock that waits for nobody."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Stands for the module `time`: sleeping takes no time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.at: dict[float, Callable[[], None]] = {}
        """Moment -> what happens then."""

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Go on by so many seconds."""
        self.now += max(seconds, 1e-3)
        for moment in [moment for moment in self.at if moment <= self.now]:
            self.at.pop(moment)()
