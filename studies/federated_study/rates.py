"""The runs that choose learning rates: every strategy at several rates, on development texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from flora_train.federated.result_types import FederatedReport

from .runs import StudyError

GRID: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "lora": ("lr", (2e-3, 4e-3, 8e-3)),
    "slora": ("sparse_lr", (1e-3, 3e-3, 1e-2)),
    "flora": ("lr", (4e-2, 8e-2, 1.6e-1)),
    "ia3": ("lr", (4e-2, 8e-2, 1.6e-1)),
    "full": ("lr", (1e-4, 3e-4, 1e-3)),
}
"""Strategy of recipe=federated_local -> the key that is chosen, and its values. The second stage of slora and
lora_products have the rate of lora."""
SPARSE_SHARE = 0.4
"""Part of the rounds that slora's first stage takes, as in the recipe."""


def rates_recipe(
    recipe: Mapping[str, Any], texts: Path, *, rounds: int, strategies: list[str]
) -> dict[str, Any]:
    """A recipe that runs every strategy at each of its rates.

    Args:
        recipe: The content of recipes/federated_local.yaml.
        texts: Folder with development.train.jsonl and development.validation.jsonl.
        rounds: Rounds of each run.
        strategies: Keys of GRID.

    Returns:
        The recipe: an adapter and a strategy for each rate, evaluated after the last round.

    Raises:
        StudyError: A strategy is unknown, or there are too few rounds for two stages.
    """
    if rounds < 2:
        raise StudyError(f"--rounds {rounds}: slora has two stages, so that at least 2 are needed")
    made = deepcopy(dict(recipe))
    (task,) = made["tasks"].values()
    task["train"] = str(texts / "development.train.jsonl")
    task["validation"] = str(texts / "development.validation.jsonl")
    adapters: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for strategy in strategies:
        if strategy not in GRID:
            raise StudyError(f"--strategies {strategy}: there are {', '.join(GRID)}")
        key, rates = GRID[strategy]
        for rate in rates:
            own = dict(recipe["federated"]["strategies"][strategy])
            adapter = dict(recipe["adapters"][own["adapter"]])
            name = name_of(strategy, rate)
            target = adapter if key == "lr" else own
            target[key] = rate
            own["adapter"] = name
            if "sparse_rounds" in own:
                own["sparse_rounds"] = max(1, round(SPARSE_SHARE * rounds))
            adapters[name], runs[name] = adapter, own
    made["name"] = "federated_rates"
    made["adapters"] = adapters
    made["federated"] |= {"rounds": rounds, "interval": rounds, "strategies": runs}
    return made


def name_of(strategy: str, rate: float) -> str:
    """Name of the adapter and of the strategy with this rate."""
    return f"{strategy}_{rate:g}".replace(".", "_").replace("-", "m").replace("+", "p")


def rates_table(report: FederatedReport, strategies: list[str]) -> Iterator[str]:
    """A row for each strategy and rate, the best of each marked, then the best."""
    results = {own.name: own.figures[report.figures[0]] for own in report.strategies}
    yield f"| strategy | key | value | {report.figures[0]}, % |"
    yield "|---|---|---|---|"
    chosen = []
    for strategy in strategies:
        key, rates = GRID[strategy]
        values = {rate: results[name_of(strategy, rate)].value or 0.0 for rate in rates}
        best = max(values, key=lambda rate: values[rate])
        for rate, value in values.items():
            text = f"{100 * value:.1f}"
            yield f"| {strategy} | {key} | {rate:g} | {f'**{text}**' if rate == best else text} |"
        note = ""
        if best in (min(rates), max(rates)):
            note = " (at the edge of those tried)"
        chosen.append(f"{strategy}: {key} {best:g}{note}")
    yield ""
    yield f"Best: {'; '.join(chosen)}."
