"""Reports of federated runs, as tests need them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from flora_train.evaluation.result_model import Interval
from flora_train.evaluation.seeds import deviation
from flora_train.federated.result_types import (
    FederatedReport,
    RoundResult,
    SeedResult,
    StrategyDifference,
    StrategyResult,
)

METHODS = {"lora": "lora", "slora": "lora", "flora": "flora", "ia3": "ia3", "full": "full", "central": "lora"}
ALGORITHMS = {"slora": "slora", "full": "full"}


def interval(value: float | None, half: float = 0.02) -> Interval:
    """An interval around a value; None: not finite."""
    if value is None:
        return Interval(value=None, low=None, high=None, excludes_zero=False)
    return Interval(value=value, low=value - half, high=value + half, excludes_zero=abs(value) > half)


def federated_report(
    finals: Mapping[str, float | None],
    *,
    clients: int = 5,
    rounds: int = 4,
    seeds: Sequence[int] = (0,),
    every: int = 1,
    figures: Sequence[str] = ("accuracy", "macro_f1"),
    **changes: Any,
) -> FederatedReport:
    """A report. finals: strategy -> its first figure at the end (the first half of the rounds of `slora` are
    sparse, `central` has one round, `full` trains all weights); every: rounds between two evaluations."""
    names = [f"client-{number:03}" for number in range(clients)]
    strategies = []
    for i, (name, final) in enumerate(finals.items()):
        runs = []
        for seed in seeds:
            run = name if len(seeds) == 1 else f"{name}-seed{seed}"
            count = 1 if name == "central" else rounds
            own = [
                round_result(number, count, final, names, of=name, figures=figures, every=every)
                for number in range(count)
            ]
            sizes = {client: 10 + 3 * (number % 7) for number, client in enumerate(names)}
            runs.append(SeedResult(name=run, seed=seed, rounds=own, examples=sizes, label_entropy=0.7))
        value = interval(final).replace(deviation=deviation([final] * len(seeds)))
        strategies.append(
            StrategyResult(
                name=name,
                algorithm=ALGORITHMS.get(name, "product_mean"),
                central=name == "central",
                method=METHODS.get(name, "lora"),
                rank=None if name in ("full", "ia3") else 8,
                values=1000 * 10**i,
                seeds=runs,
                figures=dict.fromkeys(figures, value),
            )
        )
    differences = []
    for first, second in combinations(finals, 2):
        a, b = finals[first], finals[second]
        between = None if a is None or b is None else a - b
        differences.append(StrategyDifference(first=first, second=second, value=interval(between)))
    content: dict[str, Any] = {
        "name": "chapters",
        "model": "assets/models/minilm-l6",
        "dtype": "float32",
        "machine": "a processor, 2 threads",
        "packages": {"torch": "2.9.0"},
        "created": "2026-11-30T20:00:00+00:00",
        "split": "dirichlet",
        "alpha": 0.1,
        "num_clients": clients,
        "clients_per_round": min(clients, 3),
        "rounds": rounds,
        "local": "5 steps of 8 examples",
        "heldout_examples": 200,
        "confidence": 0.95,
        "figures": list(figures),
        "lower_is_better": figures[0] == "bits_per_byte",
        "strategies": strategies,
        "differences": differences,
    }
    return FederatedReport(**{**content, **changes})


def round_result(
    number: int,
    count: int,
    final: float | None,
    clients: Sequence[str],
    *,
    of: str,
    figures: Sequence[str],
    every: int,
) -> RoundResult:
    """One round of a strategy. number: from 0; count: of rounds."""
    stage: Any = "sparse" if of == "slora" and 2 * number < count else "adapter"
    if of in ("full", "central"):
        stage = of
    evaluated = (number + 1) % every == 0 or number + 1 == count
    value = None if final is None else final * (1 - math.exp(-4 * (number + 1) / count)) / (1 - math.exp(-4))
    by_client = {}
    if evaluated:
        for i, client in enumerate(clients):
            shift = 0.1 * math.sin(2.4 * i)
            by_client[client] = interval(None if value is None else value + shift, 0.1)
    sent = 40_000_000 if of == "full" else 40_000
    return RoundResult(
        round=number,
        stage=stage,
        loss=1.0,
        accepted=3,
        bytes_up=0 if of == "central" else 3 * sent,
        bytes_down=0 if of == "central" else 3 * sent,
        seconds_clients=12.5,
        seconds_server=0.2,
        left_out=None,
        figures=dict.fromkeys(figures, interval(value)) if evaluated else {},
        clients=by_client,
    )


def with_incidents(report: FederatedReport, round_number: int, **changes: Any) -> FederatedReport:
    """The report whose first strategy had another round with its first seed."""
    strategy = report.strategies[0]
    seed = strategy.seeds[0]
    rounds = list(seed.rounds)
    rounds[round_number] = rounds[round_number].replace(**changes)
    changed = strategy.replace(seeds=[seed.replace(rounds=rounds), *strategy.seeds[1:]])
    return report.replace(strategies=[changed, *report.strategies[1:]])
