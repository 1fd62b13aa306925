"""Where do keys and values of a changing set of rows stand? Left-padded to one length, with room for tokens to come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Tokens that a buffer can take beyond its content before it is copied."""


class RowLayer(DynamicLayer):
    """One layer's keys and values [B, heads, L, d]: views of buffers with room, so that a new token copies only itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states [B, heads, new, d]; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [states.new_empty(*states.shape[:2], 0, states.shape[3]) for states in (key_states, value_states)]
            self._length = 0
        end = self._length + key_states.shape[2]
        for i, states in enumerate((key_states, value_states)):
            if self._buffers[i].shape[2] < end:
                grown = states.new_empty(*states.shape[:2], end + ROOM, states.shape[3])
                grown[:, :, : self._length] = self._buffers[i][:, :, : self._length]
                self._buffers[i] = grown
            self._buffers[i][:, :, self._length : end] = states
        self._show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens of every row, padding counted."""
        return self._length if self.is_initialized else 0

    def replace(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Hold these instead; what lies beyond `length` is room."""
        self._buffers = [keys, values]
        self._show(length)

    def move(self, to: Tensor, rows: Tensor) -> None:
        """Put these rows where others stood."""
        for buffer in self._buffers:
            buffer[to, :, : self._length] = buffer[rows, :, : self._length]

    def narrow(self, rows: int, first: int) -> None:
        """Hold the first so many rows without the first columns; nothing is copied."""
        self._buffers = [buffer[:rows, :, first:] for buffer in self._buffers]
        self._show(self._length - first)

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


class RowCache:
    """Rows' keys and values in all layers, and which of their places hold tokens (mask, bool [B, L]; padding stands left)."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.layers = Cache(layer_class_to_replicate=RowLayer)

    def append_token(self) -> None:
        """Every row is about to get one more token: give the model mask and `layers` then."""
        self.mask = F.pad(self.mask, (0, 1), value=True)

    def repeat(self, rows: Tensor) -> None:
        """Hold these rows (LongTensor, repeats allowed) instead."""
        self.mask = self.mask[rows]
        for layer in self.layers.layers:
            layer.replace(layer.keys[rows], layer.values[rows], self.mask.shape[1])

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Let these rows go, and columns that are padding in all others. Rows from the end move to where they stood, so that only
        those are copied. Returns who stands at 0, 1, ... now, by the numbers from before."""
        left, gone = len(self.mask) - len(rows), set(rows)
        order = list(range(left))
        holes = [place for place in order if place in gone]
        movers = [row for row in range(left, len(self.mask)) if row not in gone]
        if holes:
            to, of = (torch.tensor(places, device=self.mask.device) for places in (holes, movers))
            self.mask[to] = self.mask[of]
            for layer in self.layers.layers:
                layer.move(to, of)
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
        mask = self.mask[:left]
        first = int((~mask).long().sum(1).min()) if left else 0
        self.mask = mask[:, first:]
        for layer in self.layers.layers:
            layer.narrow(left, first)
        return order

    def join(self, other: RowCache) -> None:
        """Take the rows of `other` in, after one's own; the shorter of both is padded on the left."""
        length = max(self.mask.shape[1], other.mask.shape[1])
        self.mask = torch.cat([F.pad(mask, (length - mask.shape[1], 0)) for mask in (self.mask, other.mask)])
        for mine, theirs in zip(self.layers.layers, other.layers.layers, strict=True):
            pairs = ((mine.keys, theirs.keys), (mine.values, theirs.values))
            mine.replace(*(_stacked(pair) for pair in pairs), length)


def _stacked(parts: tuple[Tensor, Tensor]) -> Tensor:
    """[B1, heads, L1, d] and [B2, heads, L2, d] -> [B1 + B2, heads, max(L1, L2), d], zeros on the left, room on the right."""
    length = max(part.shape[2] for part in parts)
    rows = sum(len(part) for part in parts)
    first = parts[0]
    out = first.new_zeros(rows, first.shape[1], length + ROOM, first.shape[3])
    out[: len(first), :, length - first.shape[2] : length] = first
    out[len(first) :, :, length - parts[1].shape[2] : length] = parts[1]
    return out
