"""How are figures written in a report?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

NOT_FINITE = "not finite"


def verdict(difference: Mapping[str, Any]) -> str:
    """What an estimate of a difference allows to say: better (lower), worse, unclear or not finite."""
    if any(difference[key] is None for key in ("value", "low", "high")):
        return NOT_FINITE
    return "unclear" if not difference["excludes_zero"] else "better" if difference["value"] < 0 else "worse"


def shared_digits(judged: Sequence[Mapping[str, Any]]) -> int:
    """Decimals at which a typical interval of a difference has two significant digits: one precision for the page."""
    found = [c["difference_to_base"] for r in judged for c in r["contenders"]]
    widths = sorted((d["high"] - d["low"]) / 2 for d in found if verdict(d) != NOT_FINITE)
    width = widths[len(widths) // 2] if widths else 0.0
    return min(5, max(2, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def share(value: float, sign: str = "") -> str:
    """A probability, or a difference of two, in percent."""
    return f"{100 * value:{sign}.1f}".replace("-", "\u2212")


def percent(judged: Sequence[Mapping[str, Any]]) -> str:
    """`95 %`, the confidence of all intervals."""
    return f"{100 * judged[0]['confidence']:.3g}\u00a0%"


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A fixed number of decimals, or from 1,000 on none."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if abs(value) >= 1e7:
        return f"{value:{sign}.1e}".replace("-", "−")
    text = f"{value:{sign},.{0 if abs(value) >= 100 else digits}f}".replace("-", "−")
    return re.sub(r"^[−+](?=[0.]*$)", "", text)


def interval(difference: Mapping[str, Any], digits: int) -> str:
    """`−0.054 to −0.028`."""
    return " to ".join(number(difference[key], digits, "+") for key in ("low", "high"))


def estimate(difference: Mapping[str, Any], digits: int) -> str:
    """`−0.040 [−0.054, −0.028]`."""
    if verdict(difference) == NOT_FINITE:
        return NOT_FINITE
    value, low, high = (number(difference[key], digits, "+") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def plural(n: int, word: str) -> str:
    return f"{count(n)} {word}" if n == 1 else f"{count(n)} {word}s"


def listed(words: Sequence[str], most: int = 1000) -> str:
    """`a, b and c`; beyond `most`: `a, b and 7 more`."""
    shown = [*words[:most], *([f"{len(words) - most} more"] if len(words) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
