"""How are short pieces of text put into full sequences? The longest first, each where it leaves least room.

Pieces in one sequence never see each other (`collate` restarts their positions, and transformers makes the mask from that),
so packing changes what a step costs, not what is learnt from a piece.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace

import numpy as np

from flora_train.data.tokenization import TokenSplit


def pack(split: TokenSplit, max_length: int) -> TokenSplit:
    """The same pieces in examples of at most `max_length` tokens (best fit decreasing, Johnson 1974: at most 22 % more
    sequences than the fewest possible, for many pieces). Examples come in the order of their first piece."""
    lengths = np.diff(split.offsets)
    rooms: list[tuple[int, int]] = []  # (room left, sequence), ascending
    members: list[list[int]] = []
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        place = bisect_left(rooms, (length, -1))
        if place == len(rooms):
            room, sequence = max_length, len(members)
            members.append([])
        else:
            room, sequence = rooms.pop(place)
        members[sequence].append(piece)
        insort(rooms, (room - length, sequence))
    ordered = sorted(sorted(pieces) for pieces in members)
    order = [piece for pieces in ordered for piece in pieces]
    cut = np.split(split.tokens, split.offsets[1:-1])
    return TokenSplit(
        tokens=np.concatenate([split.tokens[:0], *(cut[piece] for piece in order)]),
        offsets=np.concatenate([[0], lengths[order].cumsum()]).astype(np.int64),
        prompt_lengths=split.prompt_lengths[order],
        label_bytes=split.label_bytes[order],
        packs=np.concatenate([[0], np.cumsum([len(pieces) for pieces in ordered])]).astype(np.int64),
        counts=replace(split.counts, examples=len(ordered)),
    )
