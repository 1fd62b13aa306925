"""Embeddings of the rows of a batch: the last hidden states of their tokens, pooled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flora_train.config.embedding_schema import Pooling
from flora_train.data.batch import MixedBatch


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of those rows of a batch that have one."""

    values: Tensor
    """[n, d], float32 or more precise, not normalized."""
    positions: tuple[int, ...]
    """The rows' positions in the batch."""


class Outputs(Protocol):
    """What is computed of the rows of a batch."""

    @property
    def nats(self) -> Tensor: ...

    @property
    def embeddings(self) -> Embeddings | None: ...


def sum_of(outputs: Outputs) -> Tensor:
    """A number that depends on all outputs, to time a backward pass."""
    total = outputs.nats.sum()
    if outputs.embeddings is not None:
        total = total + outputs.embeddings.values.sum()
    return total


def pool(hidden: Tensor, batch: MixedBatch) -> Embeddings | None:
    """The embeddings of a batch; None if no row has one. hidden: the last hidden states, [B, T, d].

    Only the tokens of a row count, not its padding, which is on the right.
    """
    if batch.poolings is None:
        return None
    positions = [i for i, pooling in enumerate(batch.poolings) if pooling is not None]
    lengths = [batch.rows[i].tokens for i in positions]
    weights = torch.zeros(len(positions), hidden.shape[1], dtype=torch.float64)
    for place, (i, length) in enumerate(zip(positions, lengths, strict=True)):
        _set_weights(weights[place], batch.poolings[i], length)
    weights = weights.to(hidden.device)
    states = hidden[positions]
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    # the hidden states of padding may be anything, and 0 times infinity is no number
    states = states.masked_fill(weights[..., None] == 0, 0.0)
    values = torch.einsum("nt,ntd->nd", weights.to(states.dtype), states)
    return Embeddings(values, tuple(positions))


def _set_weights(weights: Tensor, pooling: Pooling | None, length: int) -> None:
    """Set the weights [T] of the tokens of a row."""
    if pooling == "mean":
        weights[:length] = 1 / length
    elif pooling == "cls":
        weights[0] = 1
    else:
        weights[length - 1] = 1
