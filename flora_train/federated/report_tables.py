"""The rows of the tables of a federated run, as its page and a terminal show them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

import numpy as np

from flora_train.evaluation.figures.texts import FIGURES, FigureText
from flora_train.evaluation.report.figure_tables import figure_verdict
from flora_train.evaluation.report.formatting import count, number
from flora_train.evaluation.result_model import Interval
from flora_train.federated.result_types import (
    FederatedReport,
    RoundResult,
    SeedResult,
    StrategyDifference,
    StrategyResult,
)

Item = TypeVar("Item")
MEBIBYTE = 1 << 20
MOST_DRAWN_CLIENTS, MOST_DRAWN_ROUNDS = 60, 12
"""Rows and columns of a heat map. With more, as many as that are shown, evenly spaced."""
LOWER_TAIL = 0.1
"""The quantile of clients, from the worst, beside worst, median and best."""
BITS_PER_BYTE = FigureText("bits per byte", "of held-out text", in_percent=False, lower_is_better=True)


@dataclass(frozen=True)
class Distribution:
    """The first figure of a strategy over clients."""

    strategy: str
    clients: int
    """Those whose figure is finite."""
    worst: float
    lower: float
    """A tenth of the clients are worse."""
    middle: float
    best: float


@dataclass(frozen=True)
class ClientRow:
    """A client with every strategy."""

    name: str
    examples: int
    figures: Sequence[Interval | None]
    """Of each strategy; None where the client has no held-out examples."""


@dataclass(frozen=True)
class RoundMap:
    """The first figure of one strategy by client and round."""

    strategy: str
    total: int
    """Number of clients, of which some may not be shown."""
    rounds: Sequence[int]
    """From 1."""
    rows: Sequence[tuple[str, Sequence[tuple[float, int] | None]]]
    """Client, from the worst to the best after the last round -> value and strength (0 to 100, the best value
    100) in each round."""


@dataclass(frozen=True)
class IncidentRow:
    """A client whose update is missing in a round, or a round that changed nothing."""

    run: str
    round: int
    """From 1."""
    client: str
    """Empty for a whole round."""
    status: str
    reason: str


def figure_text(name: str) -> FigureText:
    """How a figure of a federated run is shown."""
    return FIGURES.get(name, BITS_PER_BYTE)


def mebibytes(sent: float) -> str:
    """Bytes in MiB, with at least two significant digits."""
    size = sent / MEBIBYTE
    if 0 < size < 1:
        return f"{size:.2g}"
    return number(size, 1)


def sent_by(strategy: StrategyResult) -> tuple[float, float]:
    """Bytes that clients and that the server sent in all rounds, means over seeds."""
    up = fmean(seed.bytes_up for seed in strategy.seeds)
    return up, fmean(seed.bytes_down for seed in strategy.seeds)


def seconds_of(strategy: StrategyResult) -> tuple[float, float]:
    """Seconds of clients and of the server in all rounds, means over seeds."""
    clients = [sum(own.seconds_clients for own in seed.rounds) for seed in strategy.seeds]
    server = [sum(own.seconds_server for own in seed.rounds) for seed in strategy.seeds]
    return fmean(clients), fmean(server)


def failed_rounds(strategy: StrategyResult) -> int:
    """Rounds that changed nothing, of all seeds."""
    return sum(bool(own.failure) for seed in strategy.seeds for own in seed.rounds)


def missing_updates(strategy: StrategyResult) -> int:
    """Updates of clients that are part of no average, of all seeds."""
    return sum(len(own.incidents) for seed in strategy.seeds for own in seed.rounds)


def conclusion(report: FederatedReport, difference: StrategyDifference) -> str:
    """What a difference says of its first strategy: better, worse, unclear or not finite."""
    return figure_verdict(difference.value, report.lower_is_better)


def conclusions(report: FederatedReport) -> dict[tuple[str, str], str]:
    """(strategy, other) -> what their difference says of the first one, in both orders."""
    turned = {"better": "worse", "worse": "better"}
    found: dict[tuple[str, str], str] = {}
    for difference in report.differences:
        said = conclusion(report, difference)
        found[difference.first, difference.second] = said
        found[difference.second, difference.first] = turned.get(said, said)
    return found


def ranked(report: FederatedReport, strategies: Iterable[StrategyResult]) -> list[StrategyResult]:
    """Strategies whose first figure is finite, the best one first."""
    values = {}
    for strategy in strategies:
        value = strategy.figures[report.figures[0]].value
        if value is not None:
            values[strategy.name] = (value, strategy)
    sign = 1 if report.lower_is_better else -1
    return [own for _, own in sorted(values.values(), key=lambda pair: sign * pair[0])]


def population_facts(report: FederatedReport) -> dict[str, str]:
    """How the clients were made, label -> text."""
    seeds = report.strategies[0].seeds
    sizes = [size for seed in seeds for size in seed.examples.values()]
    entropies = [seed.label_entropy for seed in seeds if seed.label_entropy is not None]
    clients = count(report.num_clients)
    if report.clients_per_round < report.num_clients:
        clients += f", of which {count(report.clients_per_round)} take part in a round"
    split = "every task is a client"
    if report.split == "dirichlet":
        split = f"the examples of each label, by shares from Dirichlet({report.alpha:g})"
    facts = {"Clients": clients, "Split": split}
    if sizes:
        smallest, middle, largest = min(sizes), round(median(sizes)), max(sizes)
        text = f"{count(smallest)} (smallest), {count(middle)} (median), {count(largest)} (largest)"
        facts["Training examples of a client"] = text
    if entropies:
        text = f"{number(fmean(entropies), 2)} nats on average (0: each client has one label)"
        facts["Entropy of a client's labels"] = text
    facts["In a round, a client takes"] = report.local
    facts["Rounds"] = count(report.rounds)
    facts["Seeds"] = ", ".join(str(seed.seed) for seed in seeds)
    facts["Held-out examples"] = f"{count(report.heldout_examples)}, the same for all strategies"
    return facts


def evaluated_rounds(seed: SeedResult) -> list[RoundResult]:
    """Rounds after which the global adapter was evaluated for each client."""
    return [own for own in seed.rounds if own.clients]


def last_clients(strategy: StrategyResult) -> Mapping[str, Interval]:
    """Client -> the first figure after the last evaluated round of the first seed."""
    rounds = evaluated_rounds(strategy.seeds[0])
    return rounds[-1].clients if rounds else {}


def client_rows(report: FederatedReport) -> list[ClientRow]:
    """Every client with all strategies, first seed."""
    figures = [last_clients(strategy) for strategy in report.strategies]
    rows = []
    for client, examples in report.strategies[0].seeds[0].examples.items():
        rows.append(ClientRow(client, examples, [own.get(client) for own in figures]))
    return rows


def distributions(report: FederatedReport) -> list[Distribution]:
    """How the first figure differs between clients, strategy by strategy, first seed."""
    found = []
    for strategy in report.strategies:
        values = finite(last_clients(strategy).values())
        if not values:
            continue
        quantiles = [0.0, LOWER_TAIL, 0.5, 1.0]
        if report.lower_is_better:
            quantiles = [1 - quantile for quantile in quantiles]
        worst, lower, middle, best = (float(own) for own in np.quantile(values, quantiles))
        found.append(Distribution(strategy.name, len(values), worst, lower, middle, best))
    return found


def finite(intervals: Iterable[Interval]) -> list[float]:
    """The values that are numbers."""
    return [own.value for own in intervals if own.value is not None]


def round_maps(report: FederatedReport) -> list[RoundMap]:
    """Figures by client and round of strategies that were evaluated more than once, first seed."""
    maps = []
    for strategy in report.strategies:
        rounds = evaluated_rounds(strategy.seeds[0])
        if len(rounds) > 1:
            maps.append(_round_map(strategy.name, rounds, lower_is_better=report.lower_is_better))
    return maps


def _round_map(strategy: str, rounds: Sequence[RoundResult], *, lower_is_better: bool) -> RoundMap:
    sign = -1 if lower_is_better else 1
    last = rounds[-1].clients

    def from_worst(client: str) -> float:
        value = last[client].value
        return -np.inf if value is None else sign * value

    clients = evenly(sorted(last, key=from_worst), MOST_DRAWN_CLIENTS)
    columns = evenly(rounds, MOST_DRAWN_ROUNDS)
    values = [value for own in columns for value in finite(own.clients.values())]
    low, high = min(values, default=0.0), max(values, default=0.0)
    rows = []
    for client in clients:
        cells: list[tuple[float, int] | None] = []
        for column in columns:
            interval = column.clients.get(client)
            if interval is None or interval.value is None:
                cells.append(None)
                continue
            share = (interval.value - low) / (high - low or 1.0)
            if lower_is_better:
                share = 1 - share
            cells.append((interval.value, round(100 * share)))
        rows.append((client, cells))
    return RoundMap(strategy, len(last), [own.round + 1 for own in columns], rows)


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def incident_rows(report: FederatedReport) -> Iterator[IncidentRow]:
    """What went wrong, run by run and round by round."""
    for strategy in report.strategies:
        for seed in strategy.seeds:
            for own in seed.rounds:
                if own.failure:
                    yield IncidentRow(seed.name, own.round + 1, "", "round failed", own.failure)
                for incident in own.incidents:
                    yield IncidentRow(
                        seed.name, own.round + 1, incident.client, incident.status, incident.reason
                    )
