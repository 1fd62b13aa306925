"""Clients that fail, are slow, or return: the round goes on with the others, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flower.deployment import PATIENCE, Deployment, wait_until
from tests.flower.runs import recipe_of, report_of, saved_of, write_recipe

FAULTY = Path(__file__).parent / "faulty_app"
NAMES = ("client_0", "client_1", "client_2", "client_3")
ROUND = 240
"""Seconds of a round. The first one ends by them, since one client is slow and one is killed; in the others
four clients load and answer at a time, and sooner."""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Four clients whose faults are files in `faults`."""
    own = Deployment(tmp_path_factory.mktemp("faulty"))
    (own.folder / "faults").mkdir()
    try:
        own.start_link()
        for name in NAMES:
            own.start_node(name, faults=str(own.folder / "faults"))
        yield own
    finally:
        own.stop()


def plan(deployed: Deployment, faults: dict[str, str]) -> Path:
    """Write the faults of a run: CLIENT-ROUND -> fault; their folder."""
    folder = deployed.folder / "faults"
    for path in folder.iterdir():
        path.unlink()
    for name, fault in faults.items():
        (folder / name).write_text(fault)
    return folder


def test_a_round_goes_on_without_clients_that_fail(
    deployed: Deployment, material: Path, tmp_path: Path
) -> None:
    """One sends NaN, one is slow, one is killed and returns; in the next round one sends another shape, and
    one an archive instead of an array."""
    faults = plan(
        deployed,
        {
            "client_0-0": "nan",
            "client_2-0": f"slow {ROUND}",
            "client_3-0": "sleep",
            "client_0-1": "archive",
            "client_1-1": "shape",
        },
    )
    recipe = write_recipe(
        tmp_path / "recipe.yaml", recipe_of(material, {"adapter": "lora"}, num_clients=4, rounds=3)
    )
    folder = tmp_path / "run"
    run = deployed.run(FAULTY, recipe=str(recipe), overrides=f"output_dir={folder}", round_timeout=ROUND)
    wait_until((faults / "client_3-0-begun").exists, PATIENCE)
    deployed.kill_node("client_3")
    deployed.start_node("client_3", faults=str(faults))
    assert deployed.wait(run) == "finished:completed", deployed.output(run)
    first, second, third = saved_of(folder).rounds
    reasons = {own.client: (own.status, own.reason) for own in first.incidents}
    assert first.accepted == 1
    assert reasons.keys() == {"client_0", "client_2", "client_3"}
    assert reasons["client_0"][0] == "excluded"
    assert "numbers that are not finite" in reasons["client_0"][1]
    assert reasons["client_2"] == ("absent", f"it did not answer within {ROUND} s")
    assert reasons["client_3"][0] == "absent"
    shape = {own.client: own for own in second.incidents}["client_1"]
    assert shape.status == "excluded"
    assert "has shape" in shape.reason
    archive = {own.client: own for own in second.incidents}["client_0"]
    assert archive.status == "excluded"
    assert "does not hold an array" in archive.reason
    assert third.accepted == 4, third.incidents
    assert third.loss is not None
    (strategy,) = report_of(folder).strategies
    assert strategy.seeds[0].rounds[0].incidents == first.incidents
    output = deployed.output(run)
    assert "client_0 is excluded" in output
    assert "client_2 is absent: it did not answer" in output
    assert "client_3 has node" in output


def test_a_run_ends_when_no_client_answers(deployed: Deployment, material: Path, tmp_path: Path) -> None:
    """A round may fail, and two may not. What the programs of the clients raised is said."""
    plan(deployed, {f"{name}-{number}": "crash" for name in NAMES for number in range(2)})
    content = recipe_of(material, {"adapter": "lora"}, num_clients=4, failed_rounds=1)
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    folder = tmp_path / "run"
    run = deployed.run(FAULTY, recipe=str(recipe), overrides=f"output_dir={folder}", round_timeout=ROUND)
    assert deployed.wait(run) == "finished:failed"
    (failed,) = saved_of(folder).rounds
    assert failed.loss is None
    assert "0 of 4 updates can be used" in failed.failure
    assert {own.reason for own in failed.incidents} == {
        "its program failed: <class 'RuntimeError'>:<'out of memory'>"
    }
    assert "0 of 4 updates can be used" in deployed.output(run)


def test_too_few_clients_end_the_run_before_its_first_round(
    deployed: Deployment, material: Path, tmp_path: Path
) -> None:
    content = recipe_of(material, {"adapter": "lora"}, num_clients=5)
    recipe = write_recipe(tmp_path / "recipe.yaml", content)
    folder = tmp_path / "run"
    run = deployed.run(recipe=str(recipe), overrides=f"output_dir={folder}", start_timeout=30)
    assert deployed.wait(run) == "finished:failed"
    assert "of the 5 clients of a round were connected in 30 s" in deployed.output(run)
    assert not (folder / "run.json").exists()
