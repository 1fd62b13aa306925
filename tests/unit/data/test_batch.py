"""Rows become micro-batches that fit, shared out exactly, and tensors that say what is learnt."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from flora_train.data.batch import IGNORE, Row, collate, group_by_length, share_of_rank
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after


def random_rows(n: int, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [
        Row(int(generator.integers(-1, 6)), "ab"[i % 2], i, int(generator.integers(1, 120))) for i in range(n)
    ]


def key(row: Row) -> tuple[object, ...]:
    return (row.adapter, row.task, row.example, row.length)


@pytest.mark.parametrize("n", [0, 1, 2, 57, 300])
@pytest.mark.parametrize("max_tokens", [64, 119, 500])
def test_groups_fit_the_budget_hold_every_row_once_and_are_ordered_by_adapter(
    n: int, max_tokens: int
) -> None:
    rows = random_rows(n)
    groups = group_by_length(rows, max_tokens)
    assert sorted((row for group in groups for row in group), key=key) == sorted(rows, key=key)
    for group in groups:
        assert max(row.length for row in group) * len(group) <= max_tokens or len(group) == 1
        assert [row.adapter for row in group] == sorted(row.adapter for row in group)


def test_similar_lengths_go_together_so_that_little_is_padding() -> None:
    rows = random_rows(300)
    groups = group_by_length(rows, 1000)
    bounds = [(min(r.length for r in group), max(r.length for r in group)) for group in groups]
    assert all(low >= next_high for (low, _), (_, next_high) in pairwise(bounds))
    padded = sum(len(group) * high for group, (_, high) in zip(groups, bounds, strict=True))
    assert padded < 1.1 * sum(row.length for row in rows)


def test_groups_do_not_depend_on_the_order_of_the_rows() -> None:
    rows = random_rows(100)
    assert group_by_length(rows[::-1], 500) == group_by_length(rows, 500)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 40])
def test_shares_of_processes_are_disjoint_and_complete(processes: int, n: int) -> None:
    groups = group_by_length(random_rows(n), 200)
    shares = [share_of_rank(groups, rank, processes) for rank in range(processes)]
    assert sorted((group for share in shares for group in share), key=groups.index) == groups
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_processes_are_alike_in_tokens_though_groups_shrink(processes: int) -> None:
    groups = [[Row(0, "a", i, length)] for i, length in enumerate(range(120, 0, -10))]
    loads = [
        sum(rows[0].length for rows in share_of_rank(groups, rank, processes)) for rank in range(processes)
    ]
    assert (
        len(set(loads)) == 1
    )  # dealing in one direction only would give the first process more of every round


SPLIT = TokenSplit(
    tokens=np.array([11, 12, 13, 14, 15, 21, 22, 31, 32, 33], dtype=np.int32),
    offsets=np.array([0, 5, 7, 10]),
    **spans_after(np.array([2, 0, 1]), np.array([5, 2, 3])),
    label_bytes=np.array([3, 1, 2]),
    pack_offsets=np.arange(4),
    counts=SplitCounts(),
)


def test_collated_rows_are_right_padded_and_labelled_where_something_is_learnt() -> None:
    rows = [Row(-1, "t", 1, 2), Row(0, "t", 0, 5), Row(4, "t", 2, 3)]
    batch = collate(rows, lambda task: {"t": SPLIT}[task], 9)
    assert batch.inputs["input_ids"].tolist() == [[21, 22, 9, 9, 9], [11, 12, 13, 14, 15], [31, 32, 33, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    no = IGNORE
    assert batch.labels.tolist() == [[no, 22, no, no, no], [no, no, 13, 14, 15], [no, 32, 33, no, no]]
    assert batch.adapter_ids.tolist() == [-1, 0, 4]
    assert batch.rows == tuple(rows)
    assert {
        t.dtype
        for t in (batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, batch.adapter_ids)
    } == {torch.int64}


def test_labels_of_a_batch_are_as_many_as_the_split_counts() -> None:
    rows = [Row(0, "t", i, int(SPLIT.lengths[i])) for i in range(3)]
    labels = collate(rows, lambda task: SPLIT, 13).labels  # 13 is a token, too: padding goes by position
    assert (labels != IGNORE).sum(dim=1).tolist() == SPLIT.label_counts.tolist()


def test_batch_moves_whole_to_a_device() -> None:
    batch = collate([Row(0, "t", 0, 5)], lambda task: SPLIT, 0)
    moved = batch.to(torch.device("meta"))
    assert {
        t.device.type
        for t in (moved.inputs["input_ids"], moved.inputs["attention_mask"], moved.labels, moved.adapter_ids)
    } == {"meta"}
    assert moved.rows == batch.rows
