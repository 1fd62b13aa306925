"""Rounds of many clients in one bank: equal to one by one, deterministic, counted, robust to bad clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.config.errors import UserError
from flora_train.federated.bank_values import read_values, write_values
from flora_train.federated.local_training import Client, LocalSteps
from flora_train.federated.low_rank import weighted_sum
from flora_train.federated.server import aggregate
from flora_train.federated.simulation import Simulation
from flora_train.federated.state import factors_of, values_for
from flora_train.federated.updates import ClientUpdate
from flora_train.federated.values import AdapterValues
from flora_train.federated.weights import shares_of
from tests.unit.federated.harness import NAMES, SIZES, make_simulation


def difference(one: AdapterValues, other: AdapterValues) -> float:
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return max(float((a - b).abs().max()) for (_, a), (_, b) in pairs)


def recorded(updates: list[ClientUpdate]) -> Any:
    """A network that delivers everything and remembers it."""

    def deliver(update: ClientUpdate) -> ClientUpdate:
        updates.append(update)
        return update

    return deliver


@pytest.mark.parametrize(
    ("method", "algorithm", "optimizer"),
    [
        ("lora", "product_mean", "adamw"),
        ("lora", "factor_mean", "sgd"),
        # AdamW's first step divides a gradient by its own size. A round begins with a fresh AdamW, so that an
        # entry whose gradient is a rounding error, as some are beside a residual, moves as far as any other.
        ("lora", "fedex", "sgd"),
        ("flora", "product_mean", "adamw"),
        ("pure", "product_mean", "adamw"),
        ("pure", "factor_mean", "adamw"),
        ("ia3", "factor_mean", "adamw"),
        ("sparse", "factor_mean", "adamw"),
        ("sparse", "factor_mean", "sgd"),
    ],
)
def test_clients_together_equal_clients_one_by_one(
    tmp_path: Path, method: str, algorithm: str, optimizer: str
) -> None:
    """Updates of each client, and the global adapter after each of three rounds, of three of four clients."""
    seen: list[list[ClientUpdate]] = [[], []]
    adapter = {"dropout": 0.1} if method == "lora" else {}
    both = [
        make_simulation(
            tmp_path,
            method,
            algorithm=algorithm,
            optimizer=optimizer,
            adapter={**adapter, "lr": {"adamw": 5e-3, "sgd": 0.2}[optimizer]},
            clients_per_round=3,
            clients_at_once=at_once,
            deliver=recorded(updates),
        )
        for at_once, updates in zip((None, 1), seen, strict=True)
    ]
    start = both[0].state.values
    for _ in range(3):
        records = [simulation.round() for simulation in both]
        assert [o.client for o in records[0].outcomes] == [o.client for o in records[1].outcomes]
        assert difference(both[0].state.values, both[1].state.values) <= 1e-5
    for together, alone in zip(*seen, strict=True):
        assert together.client == alone.client
        assert difference(together.values, alone.values) <= 1e-5
    assert difference(start, both[0].state.values) > 1e-3
    assert len({update.client for update in seen[0]}) == 4


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 0, 1):
        simulation = make_simulation(tmp_path, clients_per_round=2, seed=seed)
        simulation.run(2)
        digests.append(simulation.state.values.digest())
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_each_round_begins_with_the_global_values_and_a_fresh_optimizer(tmp_path: Path) -> None:
    updates: list[ClientUpdate] = []
    simulation = make_simulation(tmp_path, deliver=recorded(updates), local=LocalSteps(4, steps=2))
    simulation.run(2)
    assert set(simulation.trainer.optimizer.steps) == {2}
    again = make_simulation(tmp_path, local=LocalSteps(4, steps=2), clients_at_once=1)
    again.progress.round = 1
    half = make_simulation(tmp_path, local=LocalSteps(4, steps=2))
    half.round()
    again.state = half.state
    again.round()
    assert difference(again.state.values, simulation.state.values) <= 1e-5


def test_bytes_are_those_of_the_values_alone(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path, "sparse", clients_per_round=2, algorithm="factor_mean")
    record = simulation.round()
    (pool,) = simulation.bank.pools
    # One number per masked entry, and the head: no index travels.
    masked = sum(round(0.05 * t.in_features * t.out_features) for t in pool.targets.values())
    head = pool.row_size - pool.head_start
    assert record.bytes_up == record.bytes_down == 2 * 4 * (masked + head)
    assert [outcome.bytes_up for outcome in record.outcomes] == [4 * (masked + head)] * 2
    assert record.loss is not None
    assert 0.5 < record.loss < 3
    assert record.left_out is None


def spoiled(update: ClientUpdate, how: str) -> ClientUpdate | None:
    """A bad answer of a client."""

    def with_nan(name: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan")) if name.endswith("A") else tensor

    changed = {
        "silent": None,
        "nan": replace(update, values=update.values.map(with_nan)),
        "infinite": replace(update, values=update.values.map(lambda _, tensor: tensor / 0)),
        "shape": replace(update, values=update.values.map(lambda _, tensor: tensor[:1])),
        "missing": replace(update, values=AdapterValues(dict(list(update.values.layers.items())[1:]))),
        "base": replace(update, base="0" * 64),
        "mask": replace(update, mask="0" * 64),
        "method": replace(update, spec=replace(update.spec, method="flora")),
        "examples": replace(update, examples=0),
    }
    return changed[how]


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("silent", "absent", "it did not answer"),
        ("nan", "excluded", "numbers that are not finite"),
        ("infinite", "excluded", "numbers that are not finite"),
        ("shape", "excluded", "has shape"),
        ("missing", "excluded", "has shape None, expected"),
        ("base", "excluded", "for another base: 000000000000"),
        ("mask", "excluded", "its mask differs: 000000000000, expected none"),
        ("method", "excluded", "of method flora, expected lora"),
        ("examples", "excluded", "states 0 examples"),
    ],
)
def test_a_round_goes_on_without_a_bad_client(tmp_path: Path, how: str, status: str, reason: str) -> None:
    def deliver(update: ClientUpdate) -> ClientUpdate | None:
        good.append(update)
        return spoiled(update, how) if update.client == "client_1" else update

    good: list[ClientUpdate] = []
    simulation = make_simulation(tmp_path, deliver=deliver)
    start = simulation.state
    record = simulation.round()
    assert [outcome.status for outcome in record.outcomes] == ["accepted", status, "accepted", "accepted"]
    assert reason in record.outcomes[1].reason
    others = [update for update in good if update.client != "client_1"]
    expected = aggregate(start, others, "product_mean").state.values
    assert simulation.state.values.digest() == expected.digest()
    assert simulation.round().outcomes[1].status == status


def test_a_client_whose_training_fails_is_excluded_and_the_others_do_not_notice(tmp_path: Path) -> None:
    """NaN in what one client begins with: its rows share every forward pass with the others'."""
    runs = []
    for poison in (False, True):
        simulation = make_simulation(tmp_path)
        if poison:
            send = simulation._broadcast

            def broadcast(client: str, send: Any = send, simulation: Simulation = simulation) -> int:
                sent = send(client)
                if client == "client_2":
                    simulation.bank.row(simulation.bank.ids["client_2-lora"])[0] = float("nan")
                return sent

            simulation._broadcast = broadcast  # type: ignore[method-assign]
        updates: list[ClientUpdate] = []
        simulation.deliver = recorded(updates)
        record = simulation.round()
        runs.append([u.values.digest() for u in updates if u.client != "client_2"])
    assert record.outcomes[2].status == "excluded"
    assert runs[0] == runs[1]


def test_a_round_without_enough_updates_changes_nothing_or_is_an_error(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path, deliver=lambda update: None, failed_rounds=1)
    before = simulation.state
    record = simulation.round()
    assert record.failure == "clients = 4: no client answered"
    assert record.loss is None
    assert simulation.state is before
    with pytest.raises(UserError, match="no client answered"):
        simulation.round()

    def one_answers(update: ClientUpdate) -> ClientUpdate | None:
        return update if update.client == "client_0" else None

    simulation = make_simulation(tmp_path, deliver=one_answers, min_clients=2)
    with pytest.raises(
        UserError, match=r"1 of 4 updates can be used, and 2 are needed; client_1: it did not"
    ):
        simulation.round()


def test_fedex_computes_the_mean_of_the_clients_exactly(tmp_path: Path) -> None:
    """After a round the global adapter on the new base has the weight W0 + sum_k w_k s B_k A_k."""
    updates: list[ClientUpdate] = []
    simulation = make_simulation(tmp_path, algorithm="fedex", deliver=recorded(updates), clients_per_round=2)
    module = next(iter(simulation.bank.pools[0].targets))
    layer: Any = simulation.bank.model.get_submodule(module)
    W0, base = layer.weight.detach().double().clone(), simulation.state.base
    first = simulation.round()
    shares = shares_of([update.examples for update in updates])
    parts = [factors_of(update.values.layers[module], update.spec) for update in updates]
    mean = factors_of(simulation.state.values.layers[module], simulation.state.spec)
    now = layer.weight.detach().double() + mean.dense()
    torch.testing.assert_close(now, W0 + weighted_sum(parts, shares).dense(), rtol=0, atol=1e-6)
    assert (layer.weight.detach().double() - W0).norm() > 1e-6
    assert simulation.state.base != base
    # Clients of the next round also get the residual; those that missed it before, too.
    residual, values = simulation.state.residual_bytes, first.bytes_down // 2
    assert residual > 0
    second = simulation.round()
    assert second.bytes_down == 2 * (values + residual)
    assert {outcome.status for outcome in second.outcomes} == {"accepted"}


def test_clients_of_other_ranks_get_the_closest_part_and_are_averaged(tmp_path: Path) -> None:
    updates: list[ClientUpdate] = []
    simulation = make_simulation(tmp_path, ranks=(1, 2, 3, None), deliver=recorded(updates))
    assert len(simulation.bank.pools) == 3
    records = simulation.run(2)
    assert {outcome.status for outcome in records[1].outcomes} == {"accepted"}
    assert records[1].outcomes[0].bytes_down < records[1].outcomes[2].bytes_down
    assert records[1].left_out is not None
    module = next(iter(simulation.state.values.layers))
    whole = factors_of(simulation.state.values.layers[module], simulation.state.spec)
    U, S, Vh = torch.linalg.svd(whole.dense())
    small = updates[0].spec
    part = factors_of(values_for(simulation.state, small).layers[module], small)
    assert part.rank == 1
    torch.testing.assert_close(part.dense(), S[0] * torch.outer(U[:, 0], Vh[0]), rtol=0, atol=1e-6)


def test_the_global_adapter_can_be_loaded_into_the_bank(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    simulation.round()
    simulation.load_global("client_3-lora")
    assert difference(read_values(simulation.bank, "client_3-lora"), simulation.state.values) == 0.0
    zeros = simulation.state.values.map(lambda _, tensor: torch.zeros_like(tensor))
    write_values(simulation.bank, "client_3-lora", zeros)
    assert not simulation.bank.row(simulation.bank.ids["client_3-lora"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients_per_round": 5}, r"clients_per_round = 5: there are 4 clients"),
        ({"clients_per_round": 0}, r"clients_per_round = 0: there are 4 clients: ask for 1 to 4 in a round"),
        ({"clients_per_round": 2, "min_clients": 3}, r"min_clients = 3: a round has 2 clients"),
        ({"clients_at_once": 0}, r"clients_at_once = 0: must be at least 1"),
        ({"min_clients": 0}, r"min_clients = 0: must be at least 1"),
        ({"adapter": {"rank": 33}}, r"rank = 33: .*query is 32 x 32: it has 32 singular values"),
        ({"ranks": (4, 3, 3, 3)}, r"client_0-lora = 4: its rank is above 3"),
        ({"ranks": (2, 3, 3, 3), "algorithm": "fedex"}, r"client_0-lora = 2: fedex needs clients of rank 3"),
        ({"algorithm": "factor_means"}, r"Did you mean 'factor_mean'"),
        ({"method": "ia3", "algorithm": "fedex"}, r"cannot average ia3"),
        (
            {"method": "flora", "algorithm": "fedex"},
            r"cannot average flora \(factor_mean or product_mean can\)",
        ),
    ],
)
def test_bad_options_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_simulation(tmp_path, **options)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([("client_0", "client_0-lora", ())], "client_0: has no examples"),
        ([("client_0", "client_0-lora", (0, 40))], "client_0 = 40: its task has 40 training examples"),
        ([("client_0", "client_0-lora", (0,)), ("client_0", "client_1-lora", (0,))], "the same name"),
        ([("client_0", "client_0-lora", (0,)), ("client_1", "client_0-lora", (0,))], "the same adapter"),
        ([("client_0", "client_9-lora", (0,))], "client_9-lora"),
    ],
)
def test_bad_clients_are_refused_before_training(tmp_path: Path, clients: Any, message: str) -> None:
    good = make_simulation(tmp_path)
    bad = [Client(*client) for client in clients]
    with pytest.raises(UserError, match=message):
        Simulation(good.trainer, bad, good.state, options=good.options)


@pytest.mark.parametrize("steps", [{"batch_examples": 0}, {"epochs": 0}, {"steps": 0}, {"steps": 10**6}])
def test_local_steps_are_at_least_one(steps: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"(federated\.\w+|training\.steps) = \d+: must be"):
        LocalSteps(**steps)


@pytest.mark.parametrize("policy", ["quarantine", "rollback"])
def test_the_guard_of_one_round_does_not_count_in_the_next(tmp_path: Path, policy: str) -> None:
    """A client that the guard stopped in one round takes part in the next one."""
    simulation = make_simulation(tmp_path, guard={"policy": policy})
    trainer, victim = simulation.trainer, simulation.bank.ids["client_2-lora"]
    step, broken = trainer.step, [True]

    def poisoned(number: int, plan: Any) -> None:
        if broken[0]:
            simulation.bank.row(victim)[0] = float("nan")
        step(number, plan)

    trainer.step = poisoned  # type: ignore[method-assign]
    assert simulation.round().outcomes[2].status == "excluded"
    assert bool(trainer.guard.quarantined) == (policy == "quarantine")
    broken[0] = False
    assert {outcome.status for outcome in simulation.round().outcomes} == {"accepted"}
    assert not trainer.guard.quarantined


def test_batches_cover_each_epoch_once_and_depend_on_client_and_round() -> None:
    client = Client("client_0", "client_0-lora", tuple(range(10, 10 + SIZES[0])))
    batches = LocalSteps(4, epochs=2).batches(client, 0, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 1] * 2
    assert sorted(sum(batches[:3], ())) == list(client.examples)
    assert batches[:3] != batches[3:]
    assert batches != LocalSteps(4, epochs=2).batches(client, 1, seed=0)
    other = replace(client, name=NAMES[1])
    assert batches != LocalSteps(4, epochs=2).batches(other, 0, seed=0)
    assert len(LocalSteps(4, steps=7).batches(client, 0, seed=0)) == 7


def test_held_out_results_are_those_of_the_global_adapter_for_each_client(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    before = simulation.heldout()
    simulation.run(3)
    after = simulation.heldout(max_examples=5)
    for name in NAMES:
        adapter = simulation.bank.ids[f"{name}-lora"]
        assert len(after[name].nats[adapter]) == 5
        assert after[name].labels is not None
        assert before[name].loss(adapter, 5) != after[name].loss(adapter)
        assert torch.equal(simulation.bank.row(adapter), simulation.bank.row(0))
