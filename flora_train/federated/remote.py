"""One client's and the server's part of a round, as lists of numpy arrays and plain facts.

Flower and others carry these between processes. No other number leaves a client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any

import numpy as np
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
MOST_EXAMPLES = 10**9
"""The largest number of examples that a client may state where the server does not know it."""
LARGEST_LOSS = 1e6
"""A mean loss beyond it counts as missing, so that one client does not hide those of the others."""


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


def update_of(
    client: str, spec: AdapterSpec, answer: Answer, state: GlobalState, *, known_examples: int | None = None
) -> ClientUpdate:
    """The update in a client's answer, which `sort_updates` then accepts or excludes.

    Args:
        client: Its name.
        spec: Its adapter, as the server knows it.
        answer: That arrived.
        state: The server's state.
        known_examples: The number of its examples, where the server knows it. Otherwise that which it states
            is trusted, up to MOST_EXAMPLES: it is the client's weight in averages.

    Returns:
        The update.

    Raises:
        UserError: The answer has another number of tensors, states more examples than there are, or facts
            that are not what they should be.
    """
    facts = answer.facts
    examples, loss = facts.get("examples"), facts.get("loss")
    if not isinstance(examples, int) or isinstance(examples, bool):
        raise user_error(f"{client}: examples", examples, "must be the number of its examples")
    if known_examples is not None and examples > known_examples:
        hint = f"are more than the {known_examples:,} that the server's data has for this client"
        raise user_error(f"{client}: examples", examples, hint)
    if examples > MOST_EXAMPLES:
        hint = f"are more than {MOST_EXAMPLES:,}, the most that a client may state"
        raise user_error(f"{client}: examples", examples, hint)
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
        loss=_usable_loss(loss),
        failure="" if failure is None else told(failure),
        received=bytes_of(answer),
    )


def bytes_of(answer: Answer) -> int:
    """Bytes of the arrays of an answer, as they arrived."""
    return sum(array.nbytes for array in answer.arrays if isinstance(array, np.ndarray))


def told(text: object) -> str:
    """What a client says, as one line of bounded length that can be logged."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[:LONGEST_TEXT])
    return line.strip() or "no reason is given"


def _usable_loss(fact: Fact | None) -> float | None:
    if isinstance(fact, bool) or not isinstance(fact, int | float):
        return None
    if not abs(fact) <= LARGEST_LOSS:  # NaN, too
        return None
    return float(fact)


def collect_answers(
    chosen: Sequence[str],
    answers: Mapping[str, Answer],
    specs: Mapping[str, AdapterSpec],
    state: GlobalState,
    *,
    failed: Mapping[str, ClientOutcome] = MappingProxyType({}),
    known_examples: Mapping[str, int] = MappingProxyType({}),
) -> tuple[list[ClientUpdate], list[ClientOutcome]]:
    """The usable updates of a round, and the outcome of every client: no answer stops a round.

    Args:
        chosen: The clients of the round.
        answers: Client -> what arrived from it.
        specs: Client -> its adapter, as the server knows it. Others are not known.
        state: The server's state.
        failed: Client -> its outcome, where nothing arrived that is an answer.
        known_examples: Client -> the number of its examples, of those where the server knows it.

    Returns:
        As `sort_updates`.
    """
    updates, unreadable = [], dict(failed)
    strangers = []
    for client, answer in answers.items():
        sent = bytes_of(answer)
        if client not in chosen or client not in specs:
            reason = "it was not chosen for this round"
            strangers.append(ClientOutcome(client, "excluded", reason, bytes_up=sent))
            continue
        known = known_examples.get(client)
        try:
            updates.append(update_of(client, specs[client], answer, state, known_examples=known))
        except UserError as error:
            unreadable[client] = ClientOutcome(client, "excluded", told(error), bytes_up=sent)
        except Exception as error:  # whatever a client sends, the round goes on with the others
            reason = f"its answer cannot be read ({type(error).__name__})"
            unreadable[client] = ClientOutcome(client, "excluded", reason, bytes_up=sent)
    expected = {client: expected_of(state, specs[client]) for client in chosen}
    accepted, outcomes = sort_updates(chosen, updates, expected, unreadable=unreadable)
    return accepted, outcomes + strangers
