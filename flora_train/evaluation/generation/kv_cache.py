"""Keys and values of a changing set of rows, left-padded to one length, in buffers with spare capacity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 64
"""Tokens that a buffer can hold beyond its content before it must be copied."""


class RowLayer(DynamicLayer):
    """One layer's keys and values [B, heads, L, d], as views of larger buffers: a new token copies only
    itself.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states [B, heads, new, d]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty(*states.shape[:2], 0, states.shape[3])
                for states in (key_states, value_states)
            ]
            self._length = 0
        end = self._length + key_states.shape[2]
        for i, states in enumerate((key_states, value_states)):
            if self._buffers[i].shape[2] < end:
                larger = states.new_empty(*states.shape[:2], end + SPARE, states.shape[3])
                larger[:, :, : self._length] = self._buffers[i][:, :, : self._length]
                self._buffers[i] = larger
            self._buffers[i][:, :, self._length : end] = states
        self._set_length(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of every row, including padding."""
        return self._length if self.is_initialized else 0

    def replace(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Replace the content. Positions beyond `length` are spare capacity."""
        self._buffers = [keys, values]
        self._set_length(length)

    def move(self, to: Tensor, rows: Tensor) -> None:
        """Copy `rows` to the positions `to`."""
        for buffer in self._buffers:
            buffer[to, :, : self._length] = buffer[rows, :, : self._length]

    def narrow(self, rows: int, first: int) -> None:
        """Keep the first `rows` rows, without the columns before `first`. Nothing is copied."""
        self._buffers = [buffer[:rows, :, first:] for buffer in self._buffers]
        self._set_length(self._length - first)

    def _set_length(self, length: int) -> None:
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


class RowCache:
    """Keys and values of rows in all layers, and the mask of their tokens."""

    def __init__(self, mask: Tensor) -> None:
        """mask: bool [B, L], False at padding, which is on the left."""
        self.mask = mask
        self.layers = Cache(layer_class_to_replicate=RowLayer)

    def append_token(self) -> None:
        """Extend the mask by one token per row, before the model appends its keys and values to `layers`."""
        self.mask = F.pad(self.mask, (0, 1), value=True)

    def repeat(self, rows: Tensor) -> None:
        """Replace the rows by these (LongTensor of row numbers, which may repeat)."""
        self.mask = self.mask[rows]
        for layer in self.layers.layers:
            layer.replace(layer.keys[rows], layer.values[rows], self.mask.shape[1])

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove these rows, and columns that are padding in all others; returns the old number of every
        remaining row.

        Rows from the end fill the gaps, so that only those are copied.
        """
        remaining, removed = len(self.mask) - len(rows), set(rows)
        order = list(range(remaining))
        gaps = [row for row in order if row in removed]
        moved = [row for row in range(remaining, len(self.mask)) if row not in removed]
        if gaps:
            to, source = (torch.tensor(numbers, device=self.mask.device) for numbers in (gaps, moved))
            self.mask[to] = self.mask[source]
            for layer in self.layers.layers:
                layer.move(to, source)
            for gap, row in zip(gaps, moved, strict=True):
                order[gap] = row
        mask = self.mask[:remaining]
        first = 0
        if remaining:
            first = int((~mask).long().sum(1).min())
        self.mask = mask[:, first:]
        for layer in self.layers.layers:
            layer.narrow(remaining, first)
        return order

    def join(self, other: RowCache) -> None:
        """Append the rows of `other`; the shorter of both caches is padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        self.mask = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask, other.mask)])
        for layer, other_layer in zip(self.layers.layers, other.layers.layers, strict=True):
            keys = _stacked((layer.keys, other_layer.keys))
            layer.replace(keys, _stacked((layer.values, other_layer.values)), length)


def _stacked(parts: tuple[Tensor, Tensor]) -> Tensor:
    """[B1, heads, L1, d] and [B2, heads, L2, d] -> [B1 + B2, heads, max(L1, L2) + SPARE, d], zeros on the
    left.
    """
    length = max(part.shape[2] for part in parts)
    rows = sum(len(part) for part in parts)
    first = parts[0]
    out = first.new_zeros(rows, first.shape[1], length + SPARE, first.shape[3])
    out[: len(first), :, length - first.shape[2] : length] = first
    out[len(first) :, :, length - parts[1].shape[2] : length] = parts[1]
    return out
