"""Heat maps of the load of experts: layers by experts, darker where more tokens are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from flora_train.evaluation.report.formatting import count, number
from flora_train.evaluation.routing.load_types import ExpertLoad

MAX_MAPS = 48
"""Adapters that have a map; the table shows all."""


@dataclass(frozen=True)
class LoadCell:
    """One expert of one layer."""

    text: str
    """Its share of the choices, in percent."""
    strength: float
    """0 to 1: its share of the busiest expert's in this map."""
    dead: bool


@dataclass(frozen=True)
class LoadMap:
    """The load of one adapter."""

    adapter: str
    rows: Sequence[tuple[str, Sequence[LoadCell]]]
    """The label of a layer, and a cell for each expert."""
    entropies: Sequence[str]
    """Of each layer, in nats."""
    experts: int
    caption: str


def load_maps(loads: Sequence[ExpertLoad]) -> list[LoadMap]:
    """The maps of the first adapters."""
    return [_load_map(load) for load in loads[:MAX_MAPS]]


def _load_map(load: ExpertLoad) -> LoadMap:
    labels = layer_labels([layer.module for layer in load.layers])
    rows = []
    for label, layer in zip(labels, load.layers, strict=True):
        cells = [LoadCell(_percent(share), share / load.busiest, share == 0.0) for share in layer.shares]
        rows.append((label, cells))
    caption = f"task {load.task}, {count(load.tokens)} tokens of {count(load.examples)} held-out texts"
    entropies = [number(layer.entropy, 2) for layer in load.layers]
    return LoadMap(load.adapter, rows, entropies, load.experts, caption)


def _percent(share: float) -> str:
    """Whole percent; a share that would be shown as 0 is told apart from none."""
    if 0 < share < 0.005:
        return "<1"
    return f"{100 * share:.0f}"


def layer_labels(modules: Sequence[str]) -> list[str]:
    """Module names without the beginning and end that all of them share, such as `0` and `1` for
    `model.layers.0.mlp` and `model.layers.1.mlp`; one module alone keeps its name."""
    if len(modules) < 2:
        return list(modules)
    parts = [module.split(".") for module in modules]
    first = _shared(parts)
    last = _shared([each[:first:-1] for each in parts])
    return [".".join(each[first : len(each) - last]) for each in parts]


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """The number of first entries that all lists have alike."""
    columns = zip(*lists, strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def load_line(load: ExpertLoad) -> str:
    """The load of an adapter in one line of a terminal."""
    total = load.experts * len(load.layers)
    return (
        f"experts: busiest {100 * load.busiest:.0f} %, least {100 * load.least:.0f} %, "
        f"dead {load.dead} of {total}, entropy {load.entropy:.1f} of {load.largest_entropy:.1f} nats"
    )
