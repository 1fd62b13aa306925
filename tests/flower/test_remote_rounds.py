"""A round of the server whose clients answer what no client of this package would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from flora_train.config.errors import UserError
from flora_train.federated.fedex import Residual
from flora_train.federated.flower.base_history import BASE, RESIDUALS, WEIGHTS, BaseHistory
from flora_train.federated.flower.client_round import train_client
from flora_train.federated.flower.nodes import Nodes
from flora_train.federated.flower.recipe_digest import DATA, RECIPE
from flora_train.federated.flower.records import FACTS, VALUES, arrays_in
from flora_train.federated.flower.remote_rounds import Limits, RemoteRounds
from flora_train.federated.simulation import Simulation
from tests.flower.clock import Clock
from tests.flower.network import Network, node_of
from tests.flower.runs import recipe_of, write_recipe
from tests.unit.federated.harness import NAMES, SIZES, make_simulation

DIGESTS: dict[str, str | list[str]] = {RECIPE: "1" * 64, DATA: "2" * 64}
Change = Callable[[dict[str, Array], dict[str, Any]], None]
"""Changes the arrays and the facts of an answer."""


def answering(simulation: Simulation, client: str, change: Change | None) -> Any:
    """A node that answers with the values that it got, after a change."""

    def train(message: Message) -> RecordDict:
        arrays = dict(message.content.array_records[VALUES])
        examples = SIZES[NAMES.index(client)]
        facts = {"examples": examples, "method": "lora", "base": simulation.state.base, **DIGESTS}
        if change is not None:
            change(arrays, facts)
        return RecordDict({VALUES: ArrayRecord(arrays), FACTS: ConfigRecord(facts)})

    return node_of(client, train)


def rounds_of(simulation: Simulation, changes: dict[str, Change]) -> tuple[RemoteRounds, Network]:
    """The rounds of a server, and its nodes 1, 2, ..."""
    network = Network()
    for number, client in enumerate(NAMES, 1):
        network.nodes[number] = answering(simulation, client, changes.get(client))
    base = simulation.state.base
    rounds = RemoteRounds(
        simulation.server,
        Nodes(network, NAMES),
        simulation.bank,
        history=BaseHistory(base, [base], dict),
        facts=dict(DIGESTS),
        limits=Limits(answers=60.0, connected=60.0),
        known_examples=dict(zip(NAMES, SIZES, strict=True)),
    )
    return rounds, network


def first_of(arrays: dict[str, Array]) -> tuple[str, Array]:
    name = min(arrays)
    return name, arrays[name]


def with_bytes(data: bytes) -> Change:
    """Replaces the first array's bytes."""

    def change(arrays: dict[str, Array], facts: dict[str, Any]) -> None:
        name, array = first_of(arrays)
        arrays[name] = Array(array.dtype, array.shape, array.stype, data)

    return change


def in_double(arrays: dict[str, Array], facts: dict[str, Any]) -> None:
    for name, array in arrays.items():
        arrays[name] = Array.from_numpy_ndarray(array.numpy().astype(np.float64))


def with_fact(name: str, value: Any) -> Change:
    """Changes a fact."""
    return lambda arrays, facts: facts.update({name: value})


def test_a_round_goes_on_without_answers_that_are_none(clock: Clock, tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    size = simulation.state.values.nbytes
    archive = b"PK\x03\x04" + bytes(60)
    changes = {
        "client_0": with_bytes(archive),
        "client_1": with_fact("examples", 2**62),
        "client_2": in_double,
    }
    rounds, network = rounds_of(simulation, changes)
    network.refused = {4}
    record = rounds.round()
    outcomes = {outcome.client: outcome for outcome in record.outcomes}
    assert [outcomes[name].status for name in NAMES] == ["excluded", "excluded", "accepted", "absent"]
    assert "does not hold an array" in outcomes["client_0"].reason
    assert "more than the 5 that the server's data has" in outcomes["client_1"].reason
    first = next(tensor for _, tensor in simulation.state.values.tensors())
    sent = [outcomes[name].bytes_up for name in NAMES]
    assert sent == [size - first.nbytes + len(archive), size, 2 * size, 0]
    assert [outcomes[name].bytes_down for name in NAMES] == [size, size, size, 0]
    assert record.bytes_up == sum(sent)


@pytest.mark.parametrize(("name", "hint"), [(RECIPE, "the recipes differ"), (DATA, "the examples differ")])
def test_a_node_with_another_recipe_or_other_examples_is_excluded(
    clock: Clock, tmp_path: Path, name: str, hint: str
) -> None:
    simulation = make_simulation(tmp_path)
    changes = {"client_0": with_fact(name, "3" * 64), "client_1": lambda arrays, facts: facts.pop(name)}
    rounds, _ = rounds_of(simulation, changes)
    outcomes = rounds.round().outcomes
    assert [outcome.status for outcome in outcomes] == ["excluded", "excluded", "accepted", "accepted"]
    assert f"{name}: {hint}" in outcomes[0].reason
    assert "the client has 333333333333" in outcomes[0].reason
    assert "the client has none" in outcomes[1].reason


def test_a_node_trains_nothing_for_a_server_with_another_recipe(material: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(material, {"adapter": "lora"}))
    options = {
        "recipe": str(recipe),
        "overrides": f"output_dir={tmp_path / 'run'}",
        "strategy": "",
        "seed": -1,
    }
    limits = {"round-timeout": 600, "start-timeout": 300, "server-data": True}
    context = Context(1, 1, {"client": "client_0"}, RecordDict(), {**options, **limits})
    facts = ConfigRecord({"client": "client_0", RECIPE: "0" * 64})
    with pytest.raises(UserError, match=r"recipe: the recipes differ in .*this node has [0-9a-f]{12}"):
        train_client("client_0", RecordDict({FACTS: facts}), context)


def test_a_round_waits_for_its_clients(clock: Clock, tmp_path: Path) -> None:
    """Nobody is connected, and two come later: a round that may fail does not fail at once."""
    simulation = make_simulation(tmp_path, min_clients=2, failed_rounds=1)
    rounds, network = rounds_of(simulation, {})
    away, network.nodes = network.nodes, {}
    clock.at[clock.now + 40.0] = lambda: network.nodes.update({1: away[1], 3: away[3]})
    record = rounds.round()
    assert not record.failure
    assert [outcome.status for outcome in record.outcomes] == ["accepted", "absent", "accepted", "absent"]
    network.nodes = {}
    begun = clock.now
    assert rounds.round().failure
    assert clock.now - begun >= 60.0


def test_the_history_of_the_base_stays_below_the_weights() -> None:
    """A round adds 6 x 1 and 1 x 4 numbers to 6 x 4: two rounds are kept, and no more."""
    weights = {"layer": torch.zeros(6, 4)}
    history = BaseHistory("origin", ["origin"], lambda: weights)
    for number in range(5):
        history.followed(7 if number == 1 else 8)
        history.add({"layer": Residual((torch.full((6, 1), float(number)), torch.ones(1, 4)))})
        kept = [residual.nbytes for residuals in history.rounds for residual in residuals.values()]
        assert sum(kept) <= weights["layer"].nbytes
    assert len(history.rounds) == 2
    for node, kind, bytes_sent, bases in (
        (7, WEIGHTS, 96, history.bases[-1:]),
        (8, RESIDUALS, 40, history.bases[1:]),
        (9, WEIGHTS, 96, history.bases[-1:]),
    ):
        records, sent = history.records_for(node)
        assert sent == bytes_sent
        assert (records[BASE]["kind"], list(records[BASE]["bases"])) == (kind, bases)
        arrays = arrays_in(RecordDict(records), f"{kind}.0")
        assert sum(array.nbytes for array in arrays) == sent
