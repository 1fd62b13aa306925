"""Weights of the base that rounds changed (fedex): what a client misses of them, and how it follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.pool import Pool
from flora_train.config.errors import user_error
from flora_train.federated.arrays import residual_arrays, residuals_from_arrays
from flora_train.federated.bank_values import adapted_weights, add_to_base
from flora_train.federated.fedex import Residual
from flora_train.federated.flower.records import array_record, arrays_in, facts_in
from flora_train.federated.state import base_with

Residuals = Mapping[str, Residual]

BASE, WEIGHTS, RESIDUALS = "base", "weights", "residuals"
"""Names of the records. There is one of residuals for each round."""


@dataclass
class BaseHistory:
    """What the server added to the base, and how far every node has followed.

    The oldest rounds are dropped once all together are more bytes than the weights: a node that needs them
    gets the weights.
    """

    origin: str
    """Fingerprint of the base as it was loaded."""
    bases: list[str]
    """Fingerprint before the first of `rounds`, and after each of them."""
    weights: Callable[[], Mapping[str, Tensor]]
    """Module -> its weight by now."""
    rounds: list[Residuals] = field(default_factory=list)
    """What the latest rounds added, the oldest first."""
    dropped: int = 0
    """Earlier rounds, which are kept no more."""
    _at: dict[int, int] = field(default_factory=dict)
    """Node -> how many rounds it has, with those that were dropped."""

    def add(self, residuals: Residuals) -> None:
        """Note what a round added to the base."""
        if residuals:
            self.rounds.append(residuals)
            self.bases.append(base_with(self.bases[-1], residuals))
            self._drop_oldest()

    def records_for(self, node: int) -> tuple[dict[str, Any], int]:
        """What a node must get to have the server's base: records, and the bytes of their arrays."""
        begin = self._begin_of(node)
        if begin is None:
            kind, begin = WEIGHTS, len(self.rounds)
            payloads = [[_as_array(weight) for _, weight in sorted(self.weights().items())]]
        else:
            kind = RESIDUALS
            payloads = [residual_arrays(residuals) for residuals in self.rounds[begin:]]
        facts = {"origin": self.origin, "bases": self.bases[begin:], "kind": kind}
        records: dict[str, Any] = {BASE: ConfigRecord(facts)}
        for number, arrays in enumerate(payloads):
            records[f"{kind}.{number}"] = array_record(arrays)
        return records, _bytes_of(payloads)

    def followed(self, node: int) -> None:
        """Note that a node has the base of the present round."""
        self._at[node] = self.dropped + len(self.rounds)

    def forget(self, node: int) -> None:
        """Note that nothing is known about a node's base: it gets all weights that changed."""
        self._at.pop(node, None)

    def _begin_of(self, node: int) -> int | None:
        """The first of `rounds` that a node lacks; None if it needs the weights."""
        if node in self._at:
            begin = self._at[node] - self.dropped
            return begin if begin >= 0 else None
        return 0 if self.bases[0] == self.origin else None

    def _drop_oldest(self) -> None:
        """Keep no more than a node would be sent."""
        most = sum(_sent_bytes(weight) for weight in self.weights().values())
        kept = []
        for residuals in self.rounds:
            kept.append(sum(residual.nbytes for residual in residuals.values()))
        while sum(kept) > most:
            del kept[0], self.rounds[0], self.bases[0]
            self.dropped += 1


def follow_base(content: RecordDict, context: Context, bank: AdapterBank, *, loaded: str) -> str:
    """Bring a client's base to the server's.

    What was added stays in the node's context, as the weights that it gave, for the next message.

    Args:
        content: Of the server's message.
        context: Of the node.
        bank: Attached to the base as it was loaded.
        loaded: Its fingerprint.

    Returns:
        The fingerprint of the base as it is now.

    Raises:
        UserError: The client has another base, or missed residuals that the server did not send.
    """
    facts = facts_in(content, BASE)
    origin, bases = facts.get("origin"), list(facts.get("bases", []))
    if origin != loaded:
        raise user_error("base", loaded[:12], f"the server has another base, {str(origin)[:12]}")
    (pool,) = bank.pools
    weights = adapted_weights(bank, pool)
    if facts.get("kind") == WEIGHTS:
        _write(weights, arrays_in(content, f"{WEIGHTS}.0"))
        _keep(context, weights, bases[-1])
        return str(bases[-1])
    own = str(facts_in(context.state, BASE).get("fingerprint", loaded))
    if own not in bases:
        raise user_error(
            "base", own[:12], "this node missed a change of the base, which it gets with the next round"
        )
    if own != loaded:
        _write(weights, arrays_in(context.state, WEIGHTS))
    missed = range(bases.index(own), len(bases) - 1)
    for number in missed:
        residuals = residuals_from_arrays(arrays_in(content, f"{RESIDUALS}.{number}"), _shapes(pool))
        add_to_base(bank, residuals)
        own = base_with(own, residuals)
    if missed:
        _keep(context, weights, own)
    return own


def _shapes(pool: Pool) -> dict[str, tuple[int, int]]:
    return {module: (target.out_features, target.in_features) for module, target in pool.targets.items()}


def _bytes_of(payloads: list[list[NDArray[Any]]]) -> int:
    return sum(array.nbytes for arrays in payloads for array in arrays)


def _sent_bytes(weight: Tensor) -> int:
    """The bytes of `_as_array`."""
    size = torch.float32.itemsize if weight.dtype == torch.bfloat16 else weight.element_size()
    return weight.numel() * size


def _as_array(weight: Tensor) -> NDArray[Any]:
    """A copy; bfloat16, which numpy lacks, becomes float32."""
    whole = weight.float() if weight.dtype == torch.bfloat16 else weight
    return np.array(whole.detach().cpu().numpy())


def _write(weights: Mapping[str, Tensor], arrays: list[NDArray[Any]]) -> None:
    if [array.shape for array in arrays] != [tuple(own.shape) for _, own in sorted(weights.items())]:
        raise user_error("base", len(arrays), f"these are not the weights of {len(weights)} layers")
    for (_, own), array in zip(sorted(weights.items()), arrays, strict=True):
        own.copy_(torch.tensor(array))


def _keep(context: Context, weights: Mapping[str, Tensor], fingerprint: str) -> None:
    arrays = [_as_array(weight) for _, weight in sorted(weights.items())]
    context.state[WEIGHTS] = array_record(arrays)
    context.state[BASE] = ConfigRecord({"fingerprint": fingerprint})
