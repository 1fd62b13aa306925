"""Where does which method help? Every task beside every method, darker where it gains more over the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.evaluation.report.formatting import NOT_FINITE, number, share, verdict

Estimate = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """text: the difference to the base; strength: 0 to 1, of the largest gain or loss on the map; kind: better, worse, unclear, not finite."""

    text: str
    strength: float
    kind: str


@dataclass(frozen=True)
class Heatmap:
    """rows: task, and a cell for each of `families` (None: no adapter)."""

    title: str
    families: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


def gain_maps(results: Mapping[str, Any]) -> list[Heatmap]:
    """A map for held-out loss, every suite of problems, and error rates, wherever there are two tasks or more."""
    held_out = {r["task"]: {c["family"]: c["difference_to_base"] for c in r["contenders"]} for r in results["results"]}
    maps = [_map("held-out loss, bits per byte", held_out, lambda value: number(value, 2, "+"))]
    for suite in results["code"]:
        k = str(suite["k"][0])
        passed = {
            part["name"]: {d["a"]: _lower_is_better(d["pass_at"][k]) for d in part["differences"] if d["b"] == "base"}
            for part in suite["languages"]
        }
        maps.append(_map(f"pass@{k} on {suite['suite']} problems, percentage points", passed, lambda value: share(-value, "+")))
    if results["speech"]:
        heard = {
            part["task"]: {d["a"]: d[part["metric"]] for d in part["differences"] if d["b"] == "base"}
            for part in results["speech"]["languages"]
        }
        maps.append(_map("error rate", heard, lambda value: number(value, 2, "+")))
    return [one for one in maps if len(one.rows) > 1]


def _map(title: str, differences: Mapping[str, Mapping[str, Estimate]], write: Callable[[float], str]) -> Heatmap:
    """differences: task -> family -> estimate, below zero where better."""
    families = list(dict.fromkeys(family for row in differences.values() for family in row))
    sizes = sorted(abs(d["value"]) for row in differences.values() for d in row.values() if verdict(d) != NOT_FINITE)
    most = sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0  # one that ran away does not pale the others

    def cell(difference: Estimate | None) -> Cell | None:
        if difference is None:
            return None
        kind = verdict(difference)
        if kind == NOT_FINITE:
            return Cell(NOT_FINITE, 0.0, "unclear")
        return Cell(write(difference["value"]), min(1.0, abs(difference["value"]) / most) if most else 0.0, kind)

    return Heatmap(title, families, [(task, [cell(row.get(family)) for family in families]) for task, row in differences.items()])


def _lower_is_better(difference: Estimate) -> Estimate:
    value, low, high = (None if difference[key] is None else -difference[key] for key in ("value", "high", "low"))
    return {"value": value, "low": low, "high": high, "excludes_zero": difference["excludes_zero"]}
