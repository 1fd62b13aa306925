"""Packs short documents into sequences of up to max_length tokens.

Documents of one sequence do not attend to each other: `collate` restarts their positions, from which
transformers derives the mask. Packing changes the cost of a step, not what is learnt from a document.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flora_train.data.token_split import TokenSplit


def pack(split: TokenSplit, max_length: int) -> TokenSplit:
    """The same documents in examples of at most `max_length` tokens, in the order of their first document.

    Best fit decreasing (Johnson 1974): for many documents at most 22 % more sequences than the minimum. The
    tokens stay where they are: `order` has the documents of the examples.
    """
    sequence_of, count = best_fit_decreasing(np.diff(split.offsets), max_length)
    documents = np.arange(len(sequence_of), dtype=np.int64)
    firsts = np.empty(count, dtype=np.int64)
    firsts[sequence_of[::-1]] = documents[::-1]  # of several documents, the first is written last
    sizes = np.bincount(sequence_of, minlength=count)[np.argsort(firsts)]
    return replace(
        split,
        pack_offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        order=np.lexsort((documents, firsts[sequence_of])).astype(np.int64),
        counts=replace(split.counts, examples=count),
    )


def best_fit_decreasing(lengths: NDArray[np.int64], max_length: int) -> tuple[NDArray[np.int32], int]:
    """(the sequence of every document, number of sequences).

    The longest documents come first, each into the fullest sequence that has room for it, and of equally full
    ones into the first. Documents of one length are placed together.
    """
    rooms = _Rooms(max_length)
    sequence_of = np.empty(len(lengths), dtype=np.int32)
    order = np.argsort(-lengths, kind="stable")
    different, begins = np.unique(-lengths[order], return_index=True)
    ends = [*begins[1:], len(order)]
    for length, begin, end in zip(-different, begins, ends[: len(begins)], strict=True):
        documents = order[begin:end]
        placed = 0
        while placed < len(documents):
            rest = documents[placed:]
            sequences = rooms.place(int(length), len(rest))
            sequence_of[rest[: len(sequences)]] = sequences
            placed += len(sequences)
    return sequence_of, rooms.count


class _Rooms:
    """Sequences by the number of tokens that still fit into them."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.count = max_length, 0
        self._sequences: list[list[NDArray[np.int32]]] = [[] for _ in range(max_length + 1)]
        self._has_sequences = np.zeros(max_length + 1, dtype=np.bool_)

    def place(self, length: int, documents: int) -> NDArray[np.int32]:
        """The sequences of the first of `documents` documents of this length: those that the fullest
        sequences with room take, else new ones for all of them."""
        fitting = np.flatnonzero(self._has_sequences[length:])
        room = self.max_length
        if len(fitting):
            room = length + int(fitting[0])
            sequences = np.sort(np.concatenate(self._sequences[room]))
            self._sequences[room] = []
        # a sequence that takes a document is the fullest one until the next does not fit
        each = max(1, room // max(1, length))
        needed = -(-documents // each)
        if not len(fitting):
            sequences = np.arange(self.count, self.count + needed, dtype=np.int32)
            self.count += needed
        used, unused = sequences[:needed], sequences[needed:]
        placed = np.repeat(used, each)[:documents]
        full, begun = divmod(len(placed), each)
        self._put(room, unused)
        self._put(room - each * length, used[:full])
        self._put(room - begun * length, used[full:])
        return placed

    def _put(self, room: int, sequences: NDArray[np.int32]) -> None:
        if room >= 0 and len(sequences):
            self._sequences[room].append(sequences)
        if room >= 0:
            self._has_sequences[room] = bool(self._sequences[room])
