"""Clients in processes of their own, as lists of arrays, give what the simulation gives."""

from __future__ import annotations

import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.federated.arrays import (
    bytes_of_numbers,
    from_arrays,
    read_array,
    residual_arrays,
    residuals_from_arrays,
    to_arrays,
)
from flora_train.federated.bank_values import add_to_base
from flora_train.federated.fedex import Residual
from flora_train.federated.participation import choose_clients
from flora_train.federated.remote import (
    LARGEST_LOSS,
    MOST_EXAMPLES,
    Answer,
    answer_of,
    broadcast_to,
    collect_answers,
    update_of,
)
from flora_train.federated.server import aggregate
from flora_train.federated.specs import client_spec
from flora_train.federated.state import base_with, expected_of, mask_of_pool
from flora_train.federated.updates import sort_updates
from tests.unit.federated.harness import (
    NAMES,
    clients_of,
    federated_trainer,
    make_simulation,
    server_spec,
    start_of,
)


@pytest.mark.parametrize("method", ["lora", "sparse"])
def test_separate_clients_give_the_adapter_of_the_simulation(tmp_path: Path, method: str) -> None:
    """Each client has a model and a bank of its own, and answers in the opposite order."""
    algorithm, ranks = ("product_mean", (1, 3, 2, 3)) if method == "lora" else ("factor_mean", (None,) * 4)
    simulation = make_simulation(
        tmp_path, method, ranks=ranks, algorithm=algorithm, clients_per_round=3, base="base"
    )
    whole = server_spec(method)
    specs = {name: client_spec(whole, name, rank) for name, rank in zip(NAMES, ranks, strict=True)}
    trainers = {name: federated_trainer(tmp_path, [spec]) for name, spec in specs.items()}
    clients = {name: clients_of([spec])[0] for name, spec in specs.items()}
    state, options = start_of(trainers[NAMES[1]], whole, "base"), simulation.options
    for number in range(2):
        simulation.round()
        chosen = choose_clients(NAMES, 3, seed=options.seed, round_number=number)
        updates = []
        for name in reversed(chosen):
            sent = broadcast_to(state, specs[name])
            answer = answer_of(
                trainers[name],
                clients[name],
                sent,
                local=options.local,
                round_number=number,
                seed=options.seed,
                base="base",
                mask=mask_of_pool(trainers[name].bank.pools[0]),
            )
            assert all(isinstance(value, str | int | float) for value in answer.facts.values())
            updates.append(update_of(name, specs[name], answer, state))
        accepted, outcomes = sort_updates(
            chosen, updates, {name: expected_of(state, specs[name]) for name in chosen}
        )
        assert [outcome.status for outcome in outcomes] == ["accepted"] * 3
        state = aggregate(state, accepted, algorithm).state
        for (_, mine), (_, theirs) in zip(
            state.values.tensors(), simulation.state.values.tensors(), strict=True
        ):
            assert float((mine - theirs).abs().max()) <= 1e-5


def test_fedex_clients_that_missed_a_round_add_what_they_missed(tmp_path: Path) -> None:
    """Each client's base is its own, and becomes that of the simulation when it gets the residuals."""
    sgd: dict[str, Any] = {"optimizer": "sgd"}
    simulation = make_simulation(
        tmp_path, algorithm="fedex", clients_per_round=2, base="base", adapter={"lr": 0.2}, **sgd
    )
    whole = server_spec(lr=0.2)
    specs = {name: client_spec(whole, name) for name in NAMES}
    trainers = {name: federated_trainer(tmp_path, [spec], **sgd) for name, spec in specs.items()}
    clients = {name: clients_of([spec])[0] for name, spec in specs.items()}
    bases, seen = dict.fromkeys(NAMES, "base"), dict.fromkeys(NAMES, 0)
    state, history, options = start_of(trainers[NAMES[0]], whole, "base"), [], simulation.options
    shapes = {
        module: (target.out_features, target.in_features)
        for module, target in simulation.bank.pools[0].targets.items()
    }
    gaps = set()
    for number in range(4):
        simulation.round()
        chosen = choose_clients(NAMES, 2, seed=options.seed, round_number=number)
        answers = {}
        for name in chosen:
            gaps.add(number - seen[name])
            for missed in history[seen[name] :]:
                residuals = residuals_from_arrays(residual_arrays(missed), shapes)
                add_to_base(trainers[name].bank, residuals)
                bases[name] = base_with(bases[name], residuals)
            seen[name] = number
            sent = broadcast_to(state, specs[name])
            answers[name] = answer_of(
                trainers[name],
                clients[name],
                sent,
                local=options.local,
                round_number=number,
                seed=options.seed,
                base=bases[name],
            )
        accepted, outcomes = collect_answers(chosen, answers, specs, state)
        assert [outcome.reason for outcome in outcomes] == ["", ""]
        state = aggregate(state, accepted, "fedex").state
        history.append(state.residuals)
        assert state.residual_bytes > 0
        for (_, mine), (_, theirs) in zip(
            state.values.tensors(), simulation.state.values.tensors(), strict=True
        ):
            assert float((mine - theirs).abs().max()) <= 1e-5
    assert max(gaps) > 1


def test_arrays_that_hold_no_residual_are_refused() -> None:
    factors = Residual((torch.ones(5, 1), torch.ones(1, 4)))
    dense = Residual((torch.ones(2, 3),))
    shapes = {"a": (5, 4), "b": (2, 3)}
    arrays = residual_arrays({"b": dense, "a": factors})
    again = residuals_from_arrays(arrays, shapes)
    assert torch.equal(again["a"].dense(), factors.dense())
    assert torch.equal(again["b"].dense(), dense.dense())
    with pytest.raises(UserError, match="1 more than the layers need"):
        residuals_from_arrays([*arrays, arrays[0]], shapes)
    with pytest.raises(UserError, match="hold no residual"):
        residuals_from_arrays(arrays[:2], shapes)
    with pytest.raises(UserError, match="hold no residual"):
        residuals_from_arrays([arrays[0], arrays[1][:, :2], arrays[2]], shapes)
    with pytest.raises(UserError, match="hold no residual"):
        residuals_from_arrays([arrays[0], arrays[1].T, arrays[2]], shapes)


def test_arrays_hold_the_values_and_nothing_else(tmp_path: Path) -> None:
    values = make_simulation(tmp_path).state.values
    arrays = to_arrays(values)
    assert sum(array.nbytes for array in arrays) == values.nbytes
    assert from_arrays(arrays, values).digest() == values.digest()
    arrays[0][:] = 7.0  # a copy: the values stay
    assert from_arrays(arrays, values).digest() != values.digest()
    half = values.map(lambda _, tensor: tensor.bfloat16())
    assert from_arrays(to_arrays(half), half).digest() == half.digest()


def test_answers_that_are_not_of_this_adapter_are_refused(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    state, spec, arrays = simulation.state, server_spec(), to_arrays(simulation.state.values)
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base}

    def update(arrays: Any = arrays, **changed: Any) -> Any:
        return update_of("client_0", spec, Answer(arrays, {**facts, **changed}), state)

    assert update().examples == 3
    with pytest.raises(UserError, match=r"arrays = .*: this adapter has \d+ tensors"):
        update(arrays[1:])
    with pytest.raises(UserError, match="an adapter has real numbers"):
        update([np.array(["text"]), *arrays[1:]])
    with pytest.raises(UserError, match="client_0: examples: must be the number of its examples"):
        update_of("client_0", spec, Answer(arrays, {}), state)
    with pytest.raises(UserError, match="method = 'flora': the server expects lora"):
        update(method="flora")
    failed = update(failure="none of its 3 steps had a finite loss and gradient")
    _, outcomes = sort_updates(["client_0"], [failed], {"client_0": expected_of(state, spec)})
    assert outcomes[0].reason.startswith("none of its 3 steps")
    wrong = update([arrays[0][:1], *arrays[1:]])
    _, outcomes = sort_updates(["client_0"], [wrong], {"client_0": expected_of(state, spec)})
    assert "has shape" in outcomes[0].reason


def test_the_server_goes_on_without_an_answer_that_it_cannot_read(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    state, specs = simulation.state, dict.fromkeys(NAMES, server_spec())
    arrays = to_arrays(state.values)
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base}
    answers = {
        "client_0": Answer(arrays[1:], facts),
        "client_1": Answer(arrays, {**facts, "examples": "many"}),
        "client_2": Answer(arrays, facts),
        "client_9": Answer(arrays, facts),
    }
    accepted, outcomes = collect_answers(NAMES, answers, specs, state)
    assert [update.client for update in accepted] == ["client_2"]
    assert [(outcome.client, outcome.status) for outcome in outcomes] == [
        ("client_0", "excluded"),
        ("client_1", "excluded"),
        ("client_2", "accepted"),
        ("client_3", "absent"),
        ("client_9", "excluded"),
    ]
    assert "this adapter has" in outcomes[0].reason
    assert "must be the number of its examples" in outcomes[1].reason
    assert outcomes[4].reason == "it was not chosen for this round"
    assert outcomes[0].bytes_up == sum(array.nbytes for array in arrays[1:])


def test_a_client_refuses_values_of_another_shape(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    arrays = to_arrays(simulation.state.values)
    client, options = simulation.clients["client_0"], simulation.options
    with pytest.raises(UserError, match="this client's adapter has"):
        answer_of(
            simulation.trainer,
            client,
            [arrays[0][:1], *arrays[1:]],
            local=options.local,
            round_number=0,
            seed=0,
            base="base",
        )


def test_an_update_that_nobody_asked_for_is_excluded(tmp_path: Path) -> None:
    simulation = make_simulation(tmp_path)
    spec, state = server_spec(), simulation.state
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base}
    update = update_of("client_0", spec, Answer(to_arrays(state.values), facts), state)
    stranger, again = replace(update, client="client_9"), replace(update, examples=5)
    accepted, outcomes = sort_updates(
        ["client_0"], [update, stranger, again], {"client_0": expected_of(state, spec)}
    )
    assert [own.examples for own in accepted] == [3]
    assert [outcome.reason for outcome in outcomes] == ["", "it was not chosen for this round"]
    assert torch.equal(
        accepted[0].values.head[next(iter(update.values.head))], next(iter(update.values.head.values()))
    )


def saved(array: Any) -> bytes:
    """Bytes of numpy's format."""
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(shape: str, kind: str = "<f4", numbers: int = 0) -> bytes:
    """Bytes with a header that says what it likes, and so many zeros."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * numbers)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_real_numbers_are_read(kind: type, order: Any) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3), dtype=kind, order=order)
    data = saved(array)
    read = read_array(data, "A", (2, 3))
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)
    assert bytes_of_numbers(data) == array.nbytes
    assert np.array_equal(read_array(data, "A"), array)
    assert float(torch.tensor(np.ascontiguousarray(read))[1, 2]) == 5.0


ARCHIVE = BytesIO()
np.savez(ARCHIVE, a=np.ones(2))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"does not hold an array \(ValueError\)"),
        (b"PK\x03\x04" + bytes(60), r"does not hold an array"),
        (ARCHIVE.getvalue(), r"does not hold an array"),
        (b"\x93NUMPY\x03\x00" + bytes(60), r"does not hold an array"),
        (header("(1000000000000000,)"), r"has shape \(1000000000000000,\), expected \(2, 3\)"),
        (header("(0x" + "f" * 9000 + ",)"), r"does not hold an array"),
        (header("(" * 5000), r"does not hold an array"),
        (header("(-2, -3)", numbers=6), r"has shape \(-2, -3\), expected"),
        (saved(np.ones((3, 2), np.float32)), r"has shape \(3, 2\), expected \(2, 3\)"),
        (saved(np.ones((2, 3), ">f4")), "an adapter has real numbers"),
        (saved(np.ones((2, 3), np.longdouble)), "an adapter has real numbers"),
        (saved(np.ones((2, 3), "timedelta64[s]")), "an adapter has real numbers"),
        (saved(np.ones((2, 3), np.int64)), "an adapter has real numbers"),
        (saved(np.ones((2, 3), np.complex64)), "an adapter has real numbers"),
        (header("(2, 3)", "|O", 6), "an adapter has real numbers"),
        (header("(2, 3)", numbers=5), r"has 20 bytes for shape \(2, 3\)"),
        (header("(2, 3)", numbers=7), r"has 28 bytes for shape \(2, 3\)"),
    ],
    ids=range(17),
)
def test_bytes_that_hold_no_such_array_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_array(data, "A", (2, 3))
    assert 0 <= bytes_of_numbers(data) <= len(data)


def test_bytes_of_any_shape_are_read_only_where_they_fill_it() -> None:
    """Nothing is allocated: a petabyte would be."""
    with pytest.raises(UserError, match="has 24 bytes for shape"):
        read_array(header("(1000000000000000,)", numbers=6), "A")
    with pytest.raises(UserError, match=r"its shape is \(-2, -3\)"):
        read_array(header("(-2, -3)", numbers=6), "A")
    assert read_array(header("(2, 3)", numbers=6), "A").shape == (2, 3)


@pytest.mark.parametrize("kind", [">f4", np.longdouble, "timedelta64[s]", np.int64, np.bool_])
def test_arrays_that_torch_cannot_take_are_refused(tmp_path: Path, kind: Any) -> None:
    state, spec = make_simulation(tmp_path).state, server_spec()
    arrays = to_arrays(state.values)
    arrays[0] = np.ones(arrays[0].shape, kind)
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base}
    accepted, (outcome,) = collect_answers(
        ["client_0"], {"client_0": Answer(arrays, facts)}, {"client_0": spec}, state
    )
    assert not accepted
    assert outcome.status == "excluded"
    assert "an adapter has real numbers" in outcome.reason


def test_no_answer_ends_a_round(tmp_path: Path) -> None:
    """Not even one that is of another kind than an answer's arrays."""
    state, spec = make_simulation(tmp_path).state, server_spec()
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base}

    class Strange(dict[str, Any]):
        def get(self, *_: Any) -> Any:
            raise RuntimeError("strange \x1b[31m" * 1000)

    archive: Any = np.load(BytesIO(ARCHIVE.getvalue()))
    arrays = to_arrays(state.values)
    answers = {"client_0": Answer([archive, *arrays[1:]], facts), "client_1": Answer(arrays, Strange())}
    specs = dict.fromkeys(NAMES, spec)
    accepted, outcomes = collect_answers(["client_0", "client_1"], answers, specs, state)
    assert not accepted
    assert [outcome.status for outcome in outcomes] == ["excluded"] * 2
    assert "is no array" in outcomes[0].reason
    assert outcomes[0].bytes_up == sum(array.nbytes for array in arrays[1:])
    assert outcomes[1].reason == "its answer cannot be read (RuntimeError)"


@pytest.mark.parametrize(
    ("stated", "known", "message"),
    [
        (9, 9, ""),
        (8, 9, ""),
        (10, 9, "examples = 10: are more than the 9 that the server's data has"),
        (2**62, 9, "are more than the 9"),
        (MOST_EXAMPLES, None, ""),
        (MOST_EXAMPLES + 1, None, "are more than 1,000,000,000, the most that a client may state"),
        (True, None, "must be the number of its examples"),
        (0, 9, "it states 0 examples"),
        (-1, None, "it states -1 examples"),
    ],
)
def test_a_client_cannot_state_more_examples_than_it_has(
    tmp_path: Path, stated: int, known: int | None, message: str
) -> None:
    state = make_simulation(tmp_path).state
    facts: dict[str, Any] = {"examples": stated, "method": "lora", "base": state.base}
    answers = {"client_0": Answer(to_arrays(state.values), facts)}
    accepted, (outcome,) = collect_answers(
        ["client_0"],
        answers,
        {"client_0": server_spec()},
        state,
        known_examples={} if known is None else {"client_0": known},
    )
    assert bool(accepted) == (not message)
    assert message in outcome.reason


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        (0.5, 0.5),
        (3, 3.0),
        (LARGEST_LOSS, LARGEST_LOSS),
        (2 * LARGEST_LOSS, None),
        (-1e300, None),
        (math.inf, None),
        (math.nan, None),
        (10**400, None),
        ("0.5", None),
        (True, None),
        (None, None),
    ],
)
def test_losses_that_cannot_be_are_missing(tmp_path: Path, stated: Any, kept: float | None) -> None:
    state = make_simulation(tmp_path).state
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base, "loss": stated}
    update = update_of("client_0", server_spec(), Answer(to_arrays(state.values), facts), state)
    assert update.loss == kept


def test_bytes_are_those_that_arrived(tmp_path: Path) -> None:
    state, specs = make_simulation(tmp_path).state, dict.fromkeys(NAMES, server_spec())
    arrays = [array.astype(np.float64) for array in to_arrays(state.values)]
    facts: dict[str, Any] = {"examples": 3, "method": "lora", "base": state.base}
    other = {**facts, "base": "another"}
    answers = {"client_0": Answer(arrays, facts), "client_1": Answer(arrays, other)}
    _, outcomes = collect_answers(["client_0", "client_1"], answers, specs, state)
    assert [outcome.status for outcome in outcomes] == ["accepted", "excluded"]
    assert [outcome.bytes_up for outcome in outcomes] == [2 * state.values.nbytes] * 2
