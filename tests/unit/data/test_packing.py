"""Packing puts every piece into some sequence, whole, once, and no sequence is too long."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from flora_train.data.batch import IGNORE, Row, collate
from flora_train.data.packing import best_fit_decreasing, pack
from flora_train.data.templates import PromptCompletion
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import tokenize

MAX_LENGTH = 12


@pytest.fixture
def pieces(tokenizer: Any) -> TokenSplit:
    random = np.random.default_rng(0)
    texts = ["abcdefghijkl"[: random.integers(1, 12)] for _ in range(50)]
    return tokenize(
        [PromptCompletion("xy" if i % 3 else "", text) for i, text in enumerate(texts)],
        tokenizer,
        MAX_LENGTH,
        truncation="truncate",
    )


def contents(split: TokenSplit) -> list[tuple[list[int], list[list[int]]]]:
    return sorted(
        (tokens.tolist(), spans.tolist()) for i in range(len(split)) for tokens, spans in split.documents(i)
    )


def test_every_piece_is_there_once_with_its_prompt_and_bytes(pieces: TokenSplit) -> None:
    packed = pack(pieces, MAX_LENGTH)
    assert packed.is_packed
    assert not pieces.is_packed
    assert contents(packed) == contents(pieces)
    assert packed.counts.documents == pieces.counts.documents == len(pieces)
    assert packed.counts.examples == len(packed) < len(pieces)
    for total in ("lengths", "label_counts", "example_bytes"):
        assert getattr(packed, total).sum() == getattr(pieces, total).sum()
    assert packed.label_counts.sum() == packed.counts.label_tokens


def test_sequences_are_full_but_never_longer_than_allowed(pieces: TokenSplit) -> None:
    packed = pack(pieces, MAX_LENGTH)
    assert packed.lengths.max() <= MAX_LENGTH
    assert (
        len(packed) <= 11 / 9 * np.ceil(pieces.lengths.sum() / MAX_LENGTH) + 6 / 9
    )  # the bound of Dosa (2007)


def test_no_two_sequences_would_fit_into_one(pieces: TokenSplit) -> None:
    shortest, second = sorted(pack(pieces, MAX_LENGTH).lengths)[:2]
    assert shortest + second > MAX_LENGTH


def test_labels_and_positions_restart_with_every_packed_document(tokenizer: Any) -> None:
    split = pack(
        tokenize(
            [PromptCompletion("ab", "cd"), PromptCompletion("", "efg")], tokenizer, 9, truncation="truncate"
        ),
        9,
    )
    alone = tokenize([PromptCompletion("", "hi")], tokenizer, 9, truncation="truncate")
    splits = {"packed": split, "alone": alone}
    batch = collate(
        [Row(0, "packed", 0, 9), Row(1, "alone", 0, 3)], splits.__getitem__, tokenizer.pad_token_id
    )
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert "attention_mask" not in batch.inputs
    learnt = [[tokenizer.decode(token) for token in row[row != IGNORE]] for row in batch.labels]
    assert learnt == [["c", "d", "<e>", "f", "g", "<e>"], ["i", "<e>"]]


def test_a_batch_without_packed_rows_keeps_its_mask(pieces: TokenSplit) -> None:
    batch = collate([Row(0, "t", 0, int(pieces.lengths[0]))], lambda task: pieces, 0)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_an_empty_split_stays_empty(tokenizer: Any) -> None:
    assert len(pack(tokenize([], tokenizer, 8, truncation="drop"), 8)) == 0


def packed_one_by_one(lengths: list[int], max_length: int) -> list[list[int]]:
    """Best fit decreasing as it is defined, document by document."""
    rooms: list[list[int]] = []  # [tokens that still fit, sequence]
    members: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [entry for entry in rooms if entry[0] >= lengths[document]]
        if not fitting:
            fitting = [[max_length, len(members)]]
            rooms += fitting
            members.append([])
        best = min(fitting)
        best[0] -= lengths[document]
        members[best[1]].append(document)
    return sorted(sorted(documents) for documents in members)


@pytest.mark.parametrize("seed", range(20))
def test_documents_of_one_length_are_placed_as_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    max_length = int(random.integers(1, 60))
    lengths = random.integers(1, 1 + random.integers(1, max_length + 1), size=random.integers(1, 300))
    sequence_of, count = best_fit_decreasing(lengths.astype(np.int64), max_length)
    members: list[list[int]] = [[] for _ in range(count)]
    for document, sequence in enumerate(sequence_of):
        members[sequence].append(document)
    assert sorted(members) == packed_one_by_one(lengths.tolist(), max_length)


def test_a_million_documents_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, size=1_000_000)
    began = time.process_time()
    sequence_of, count = best_fit_decreasing(lengths, 512)
    assert time.process_time() - began < 20
    assert np.bincount(sequence_of, weights=lengths, minlength=count).max() <= 512
