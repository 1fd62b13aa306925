"""Rounds on Flower give the global adapter of the simulation, to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.flower.deployment import Deployment
from tests.flower.runs import (
    STRATEGY,
    assert_alike,
    recipe_of,
    report_of,
    run_locally,
    saved_of,
    write_recipe,
)

STRATEGIES: dict[str, dict[str, Any]] = {
    "ranks": {"strategy": {"adapter": "lora"}, "client_ranks": [2, 4, 3]},
    "ia3": {"strategy": {"adapter": "ia3"}},
    "slora": {
        "strategy": {
            "adapter": "lora",
            "algorithm": "slora",
            "sparse_rounds": 1,
            "density": 0.1,
            "sparse_lr": 0.05,
        }
    },
    "flora": {"strategy": {"adapter": "flora"}, "clients_per_round": 2},
    "fedex": {"strategy": {"adapter": "lora", "algorithm": "fedex"}, "clients_per_round": 2, "rounds": 3},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_flower_gives_the_adapter_of_the_simulation(
    clients: Deployment, material: Path, tmp_path: Path, name: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(material, **STRATEGIES[name]))
    run = clients.run(recipe=str(recipe), overrides=f"output_dir={tmp_path / 'flower'}", round_timeout=170)
    status = clients.wait(run)
    assert status == "finished:completed", clients.output(run)
    local = run_locally(recipe, tmp_path / "local")
    remote = saved_of(tmp_path / "flower")
    assert_alike(remote, local)
    for ours, theirs in zip(remote.rounds, local.rounds, strict=True):
        assert (ours.stage, ours.accepted) == (theirs.stage, theirs.accepted)
        assert not ours.incidents
        assert ours.bytes_up == theirs.bytes_up
        assert ours.bytes_down <= theirs.bytes_down
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.figures.keys() == theirs.figures.keys() > set()
    report = report_of(tmp_path / "flower")
    assert [own.name for own in report.strategies] == [STRATEGY]
    assert (
        report.strategies[0].seeds[0].examples
        == report_of(tmp_path / "local").strategies[0].seeds[0].examples
    )
    exported = {path.name for path in (tmp_path / "local" / "adapters").glob("*")}
    assert {path.name for path in (tmp_path / "flower" / "adapters").glob("*")} == exported
