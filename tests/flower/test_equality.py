"""Rounds on Flower give the global adapter of the simulation, to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.flower.deployment import PATIENCE, Deployment
from tests.flower.runs import (
    assert_alike,
    recipe_of,
    report_of,
    run_locally,
    saved_of,
    write_recipe,
)

SLORA = {"adapter": "lora", "algorithm": "slora", "sparse_rounds": 1, "density": 0.1, "sparse_lr": 0.05}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ranks": {"strategy": {"adapter": "lora"}, "client_ranks": [2, 4, 3]},
    "ia3": {"strategy": {"adapter": "ia3"}},
    "slora": {"strategy": SLORA},
    "flora": {"strategy": {"adapter": "flora"}, "clients_per_round": 2},
    "fedex": {"strategy": {"adapter": "lora", "algorithm": "fedex"}, "clients_per_round": 2, "rounds": 3},
}
"""A round waits for all of its clients, since the simulation has no absent ones (`min_clients`)."""


@pytest.mark.parametrize("name", STRATEGIES)
def test_flower_gives_the_adapter_of_the_simulation(
    clients: Deployment, material: Path, tmp_path: Path, name: str
) -> None:
    options = {"min_clients": STRATEGIES[name].get("clients_per_round", 3), **STRATEGIES[name]}
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(material, **options))
    run = clients.run(
        recipe=str(recipe), overrides=f"output_dir={tmp_path / 'flower'}", round_timeout=PATIENCE
    )
    status = clients.wait(run)
    assert status == "finished:completed", clients.output(run)
    local = run_locally(recipe, tmp_path / "local")
    remote = saved_of(tmp_path / "flower")
    assert_alike(remote, local)
    for own, other in zip(remote.rounds, local.rounds, strict=True):
        assert (own.stage, own.accepted) == (other.stage, other.accepted)
        assert not own.incidents
        assert own.bytes_up == other.bytes_up
        assert own.bytes_down <= other.bytes_down
        assert own.loss == pytest.approx(other.loss, abs=1e-5)
        assert own.figures.keys() == other.figures.keys() > set()
    (ours,), (theirs,) = report_of(tmp_path / "flower").strategies, report_of(tmp_path / "local").strategies
    assert (ours.name, ours.values) == (theirs.name, theirs.values)
    assert ours.seeds[0].examples == theirs.seeds[0].examples
    exported = {path.name for path in (tmp_path / "local" / "adapters").glob("*")}
    assert {path.name for path in (tmp_path / "flower" / "adapters").glob("*")} == exported
