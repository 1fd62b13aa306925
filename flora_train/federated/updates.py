"""What a client answers, what the server expects, and the outcome of each client of a round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.federated.values import AdapterValues

Status = Literal["accepted", "excluded", "absent"]


@dataclass(frozen=True)
class ClientUpdate:
    """The answer of one client in one round."""

    client: str
    spec: AdapterSpec
    """Its adapter: method, rank, scaling and offset."""
    examples: int
    """That it trained on: its weight in averages."""
    values: AdapterValues
    base: str
    """Fingerprint of the base that it trained on."""
    mask: str | None = None
    """Digest of its mask, of a sparse adapter."""
    loss: float | None = None
    """Mean training loss of the round; None if it was not finite."""
    failure: str = ""
    """Why its values are worth nothing, where the client itself knows."""
    received: int | None = None
    """Bytes of the values as they arrived; None: those of `values`, which did not travel."""

    @property
    def bytes_up(self) -> int:
        """Bytes of the values that it sent."""
        return self.values.nbytes if self.received is None else self.received


@dataclass(frozen=True)
class Expected:
    """What an update must agree with."""

    shapes: Mapping[str, tuple[int, ...]]
    """Tensor name, as in `AdapterValues.tensors` -> shape, with this client's rank."""
    base: str
    mask: str | None = None
    method: str = "lora"


@dataclass(frozen=True)
class ClientOutcome:
    """What became of one client in one round."""

    client: str
    status: Status
    """accepted: its update is part of the average. excluded: it answered, and its update is not. absent: it
    did not answer."""
    reason: str = ""
    """Why it is excluded or absent."""
    examples: int = 0
    loss: float | None = None
    bytes_up: int = 0
    """Bytes of the values that it sent."""
    bytes_down: int = 0
    """Bytes of the values that it got."""


def shapes_of(values: AdapterValues) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in values.tensors()}


def rejection_of(update: ClientUpdate, expected: Expected) -> str | None:
    """Why the server cannot use an update; None if it can.

    Args:
        update: Of a client.
        expected: Base, mask and shapes that it must have.

    Returns:
        A sentence that names what is wrong, the value and what was expected.
    """
    if update.spec.method != expected.method:
        return f"its adapter is of method {update.spec.method}, expected {expected.method}"
    if update.failure:
        return update.failure
    if update.base != expected.base:
        return f"its update is for another base: {update.base[:12]}, expected {expected.base[:12]}"
    if update.mask != expected.mask:
        return f"its mask differs: {_short(update.mask)}, expected {_short(expected.mask)}"
    if update.examples < 1:
        return f"it states {update.examples} examples"
    got = shapes_of(update.values)
    for name in sorted(expected.shapes.keys() | got.keys()):
        if got.get(name) != expected.shapes.get(name):
            return f"{name} has shape {got.get(name)}, expected {expected.shapes.get(name)}"
    for name, tensor in update.values.tensors():
        if not torch.isfinite(tensor).all():
            return f"{name} has {int((~torch.isfinite(tensor)).sum())} numbers that are not finite"
    return None


def _short(mask: str | None) -> str:
    return "none" if mask is None else mask[:12]


def sort_updates(
    chosen: Sequence[str],
    answers: Iterable[ClientUpdate],
    expected: Mapping[str, Expected],
    *,
    unreadable: Mapping[str, ClientOutcome] = MappingProxyType({}),
) -> tuple[list[ClientUpdate], list[ClientOutcome]]:
    """Separate the updates that the server can use from the others: a round goes on without a bad client.

    Args:
        chosen: The clients of the round.
        answers: What arrived, in any order.
        expected: Client -> what its update must agree with.
        unreadable: Client -> its outcome, where its answer is no update at all.

    Returns:
        The usable updates, in the order of `chosen`, so that sums do not depend on who answered first; and
        the outcome of every client, `chosen` first and then those that answered without being asked.
    """
    first: dict[str, ClientUpdate] = {}
    for update in answers:
        first.setdefault(update.client, update)
    accepted: list[ClientUpdate] = []
    outcomes = []
    for client in chosen:
        answer = first.pop(client, None)
        if answer is None and client in unreadable:
            outcomes.append(unreadable[client])
            continue
        if answer is None:
            outcomes.append(ClientOutcome(client, "absent", "it did not answer"))
            continue
        reason = rejection_of(answer, expected[client])
        if reason is None:
            accepted.append(answer)
        outcomes.append(_outcome(answer, reason))
    outcomes += [_outcome(update, "it was not chosen for this round") for update in first.values()]
    return accepted, outcomes


def _outcome(update: ClientUpdate, reason: str | None) -> ClientOutcome:
    status: Status = "accepted" if reason is None else "excluded"
    return ClientOutcome(
        update.client,
        status,
        reason or "",
        examples=update.examples,
        loss=update.loss,
        bytes_up=update.bytes_up,
    )


def check_enough(accepted: Sequence[ClientUpdate], outcomes: Sequence[ClientOutcome], least: int) -> None:
    """Raises UserError, with the reason of every client, if fewer updates than `least` can be used."""
    if len(accepted) >= max(1, least):
        return
    if all(outcome.status == "absent" for outcome in outcomes):
        raise user_error("clients", len(outcomes), "no client answered")
    reasons = [f"{outcome.client}: {outcome.reason}" for outcome in outcomes if outcome.reason]
    hint = f"{len(accepted)} of {len(outcomes)} updates can be used, and {max(1, least)} are needed; "
    raise user_error("federated.min_clients", least, hint + "; ".join(reasons))
