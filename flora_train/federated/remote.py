"""One client's and the server's part of a round, as lists of numpy arrays and plain facts.

Flower and others carry these between processes. No other number leaves a client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError, user_error
from flora_train.federated.arrays import from_arrays, to_arrays
from flora_train.federated.bank_values import read_values, write_values
from flora_train.federated.local_training import Client, LocalSteps, train_clients
from flora_train.federated.state import GlobalState, expected_of, values_for
from flora_train.federated.updates import ClientOutcome, ClientUpdate, sort_updates
from flora_train.training.trainer import Trainer

Fact = str | int | float

LONGEST_TEXT = 400
"""Characters of what a client says that are kept."""


@dataclass(frozen=True)
class Answer:
    """What a client sends: its values, and facts that are no values."""

    arrays: Sequence[NDArray[Any]]
    facts: Mapping[str, Fact]
    """examples, method and base; mask, of a sparse adapter; loss, if it was finite; failure, if there was
    one."""


def broadcast_to(state: GlobalState, spec: AdapterSpec) -> list[NDArray[Any]]:
    """What the server sends to a client with this adapter."""
    return to_arrays(values_for(state, spec))


def answer_of(
    trainer: Trainer,
    client: Client,
    arrays: Sequence[NDArray[Any]],
    *,
    local: LocalSteps,
    round_number: int,
    seed: int,
    base: str,
    mask: str | None = None,
) -> Answer:
    """A client's part of a round.

    Args:
        trainer: The client's own: its bank has the client's adapter, its tasks the client's examples.
        client: The client.
        arrays: What the server sent.
        local: Steps and batch size.
        round_number: The round, from 0.
        seed: Of the order of examples, the same on all clients.
        base: Fingerprint of the client's base.
        mask: Digest of the client's mask, of a sparse adapter.

    Returns:
        Values and facts.

    Raises:
        UserError: The arrays are not those of this adapter.
    """
    like = read_values(trainer.bank, client.adapter)
    values = from_arrays(arrays, like)
    for (name, tensor), (_, own) in zip(values.tensors(), like.tensors(), strict=True):
        if tensor.shape != own.shape:
            raise user_error(name, tuple(tensor.shape), f"this client's adapter has {tuple(own.shape)}")
    write_values(trainer.bank, client.adapter, values)
    result = train_clients(trainer, [client], local, round_number=round_number, seed=seed)[client.name]
    spec = trainer.bank.specs[trainer.bank.id_of(client.adapter)]
    facts: dict[str, Fact] = {"examples": len(client.examples), "method": spec.method, "base": base}
    if mask is not None:
        facts["mask"] = mask
    if isfinite(result.loss):
        facts["loss"] = result.loss
    if result.failure is not None:
        facts["failure"] = result.failure
    return Answer(to_arrays(read_values(trainer.bank, client.adapter)), facts)


def update_of(client: str, spec: AdapterSpec, answer: Answer, state: GlobalState) -> ClientUpdate:
    """The update in a client's answer, which `sort_updates` then accepts or excludes.

    Args:
        client: Its name.
        spec: Its adapter, as the server knows it.
        answer: That arrived.
        state: The server's state.

    Returns:
        The update.

    Raises:
        UserError: The answer has another number of tensors, or facts that are not what they should be.
    """
    facts = answer.facts
    examples, loss = facts.get("examples"), facts.get("loss")
    if not isinstance(examples, int):
        raise user_error(f"{client}: examples", examples, "must be the number of its examples")
    if facts.get("method") != spec.method:
        raise user_error(f"{client}: method", facts.get("method"), f"the server expects {spec.method}")
    mask, failure = facts.get("mask"), facts.get("failure")
    return ClientUpdate(
        client,
        spec,
        examples=examples,
        values=from_arrays(answer.arrays, values_for(state, spec)),
        base=str(facts.get("base", "")),
        mask=None if mask is None else str(mask),
        loss=_finite(loss),
        failure="" if failure is None else told(failure),
    )


def told(text: object) -> str:
    """What a client says, as one line of bounded length that can be logged."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[:LONGEST_TEXT])
    return line.strip() or "no reason is given"


def _finite(fact: Fact | None) -> float | None:
    return float(fact) if isinstance(fact, int | float) and isfinite(fact) else None


def collect_answers(
    chosen: Sequence[str],
    answers: Mapping[str, Answer],
    specs: Mapping[str, AdapterSpec],
    state: GlobalState,
    *,
    failed: Mapping[str, ClientOutcome] = MappingProxyType({}),
) -> tuple[list[ClientUpdate], list[ClientOutcome]]:
    """The usable updates of a round, and the outcome of every client: no answer stops a round.

    Args:
        chosen: The clients of the round.
        answers: Client -> what arrived from it.
        specs: Client -> its adapter, as the server knows it. Others are not known.
        state: The server's state.
        failed: Client -> its outcome, where nothing arrived that is an answer.

    Returns:
        As `sort_updates`.
    """
    updates, unreadable = [], dict(failed)
    strangers = []
    for client, answer in answers.items():
        sent = sum(array.nbytes for array in answer.arrays)
        if client not in chosen or client not in specs:
            reason = "it was not chosen for this round"
            strangers.append(ClientOutcome(client, "excluded", reason, bytes_up=sent))
            continue
        try:
            updates.append(update_of(client, specs[client], answer, state))
        except UserError as error:
            unreadable[client] = ClientOutcome(client, "excluded", str(error), bytes_up=sent)
    expected = {client: expected_of(state, specs[client]) for client in chosen}
    accepted, outcomes = sort_updates(chosen, updates, expected, unreadable=unreadable)
    return accepted, outcomes + strangers
