"""How numbers, intervals and lists are written in reports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal

from flora_train.evaluation.report.types import TaskResult
from flora_train.evaluation.result_model import Interval
from flora_train.runtime.progress import duration

NOT_FINITE = "not finite"
ABSENT = "–"
PLUS_MINUS = "\u00b1"

Verdict = Literal["better", "worse", "unclear", "not finite"]


def verdict(difference: Interval) -> Verdict:
    """The conclusion that a difference allows, where lower is better."""
    if difference.finite is None:
        return "not finite"
    if not difference.excludes_zero:
        return "unclear"
    value, _, _ = difference.finite
    return "better" if value < 0 else "worse"


def shared_digits(results: Sequence[TaskResult]) -> int:
    """Decimals at which a typical interval of a difference has two significant digits."""
    widths = []
    for result in results:
        for contender in result.contenders:
            if contender.difference_to_base.finite is not None:
                _, low, high = contender.difference_to_base.finite
                widths.append((high - low) / 2)
    widths.sort()
    width = widths[len(widths) // 2] if widths else 0.0
    if width <= 0:
        return 3
    return min(5, max(2, 1 - math.floor(math.log10(width))))


def share(value: float | None, sign: str = "") -> str:
    """A probability, or a difference of two, in percent."""
    if value is None:
        return NOT_FINITE
    return _minus(f"{100 * value:{sign}.1f}")


def percent(confidence: float) -> str:
    """The confidence of intervals, as `95 %`."""
    return f"{100 * confidence:.3g}\u00a0%"


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A fixed number of decimals, or none from 100 on."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if abs(value) >= 1e7:
        return _minus(f"{value:{sign}.1e}")
    if abs(value) >= 100:
        digits = 0
    text = _minus(f"{value:{sign},.{digits}f}")
    return re.sub(r"^[−+](?=[0.]*$)", "", text)


def interval(difference: Interval, digits: int) -> str:
    """The interval of a difference, as `−0.054 to −0.028`."""
    low, high = (number(bound, digits, "+") for bound in (difference.low, difference.high))
    return f"{low} to {high}"


def estimate(value: Interval, digits: int = 3, sign: str = "+") -> str:
    """Value and interval, by default of a difference, as `−0.040 [−0.054, −0.028]`."""
    return bracketed(value, lambda figure: number(figure, digits, sign))


def ascii_estimate(value: Interval, sign: str = "") -> str:
    """Value and interval for terminals, as `-0.040 [-0.054, -0.028]`."""
    return bracketed(value, lambda figure: f"{figure:{sign}.3f}", "+/-")


def mean_number(value: Interval, digits: int = 3) -> str:
    """A value, and its standard deviation over seeds where it is a mean over them: `0.812 ± 0.004`."""
    return number(value.value, digits) + _spread(value, lambda figure: number(figure, digits))


def mean_share(value: Interval) -> str:
    """The same of a probability, in percent."""
    return share(value.value) + _spread(value, share)


def ascii_mean(value: Interval) -> str:
    """The same for terminals, as `0.812 +/- 0.004`."""
    return ascii_number(value.value) + _spread(value, ascii_number, "+/-")


def _spread(value: Interval, write: Callable[[float], str], sign: str = PLUS_MINUS) -> str:
    if value.deviation is None:
        return ""
    return f" {sign} {write(value.deviation)}"


def ascii_number(value: float | None) -> str:
    """A value for terminals."""
    if value is None:
        return NOT_FINITE
    return f"{value:.3f}"


def share_estimate(value: Interval, sign: str = "") -> str:
    """A probability and its interval, in percent."""
    return bracketed(value, lambda figure: share(figure, sign))


def bracketed(value: Interval, write: Callable[[float], str], plus_minus: str = PLUS_MINUS) -> str:
    """`value [low, high]`, each number as `write` writes it; of a mean over seeds `value ± deviation [low,
    high]`."""
    if value.finite is None:
        return NOT_FINITE
    middle, low, high = map(write, value.finite)
    spread = _spread(value, lambda figure: write(figure).lstrip("+"), plus_minus)
    return f"{middle}{spread} [{low}, {high}]"


def count(value: int | None) -> str:
    """An integer with thousands separators."""
    if value is None:
        return ABSENT
    return f"{value:,}"


def stage_duration(seconds: float | None) -> str:
    """The time of a stage."""
    if seconds is None:
        return ABSENT
    if seconds < 0.5:
        return "under a second"
    return duration(seconds)


def plural(n: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    if n != 1:
        noun += "s"
    return f"{count(n)} {noun}"


def listed(items: Sequence[str], limit: int = 1000) -> str:
    """`a, b and c`; beyond `limit`: `a, b and 7 more`."""
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(f"{len(items) - limit} more")
    if len(shown) == 1:
        return shown[0]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")
