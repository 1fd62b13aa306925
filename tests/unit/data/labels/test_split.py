"""What examples of labelled texts are labelled with, in splits and in batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flora_train.data.batch import Row, collate
from flora_train.data.documents import EncodedDocument, EncodedExample
from flora_train.data.labels.spec import LabelSpec, LabelType
from flora_train.data.labels.split import LabelSplit, label_split
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.token_split import TokenSplit, spans_after

TEXTS = [[2, 5, 3], [2, 6, 7, 3, 8, 3]]
TYPES = [[0, 0, 0], [0, 0, 0, 0, 1, 1]]


def labelled(
    spec: LabelSpec, targets: list[tuple[float, ...]], *, with_types: bool = True, path: Path | None = None
) -> LabelSplit:
    with SplitBuilder(path) as builder:
        for tokens, types, target in zip(TEXTS, TYPES, targets, strict=True):
            array = np.array(types, dtype=np.int8) if with_types else None
            document = EncodedDocument(np.array(tokens, dtype=np.int32), (), 0, array)
            builder.add(EncodedExample((document,), "whole", target=target))
        return label_split(builder.split(), spec)


def plain() -> TokenSplit:
    return TokenSplit(
        tokens=np.arange(1, 5, dtype=np.int32),
        offsets=np.array([0, 4]),
        **spans_after(np.array([1]), np.array([4])),
        label_bytes=np.array([3]),
        pack_offsets=np.array([0, 1]),
        counts=SplitBuilder().split().counts,
    )


@pytest.mark.parametrize(
    ("task_type", "stored", "expected"),
    [
        ("single", [(1.0,), (0.0,)], [1, 0]),
        ("regression", [(2.5,), (-1.0,)], [2.5, -1.0]),
        ("multi", [(1.0, 0.0), (1.0, 1.0)], [(1.0, 0.0), (1.0, 1.0)]),
        ("tokens", [(-100.0, 1.0, -100.0), (-100.0, 0.0, -100.0, 1.0, 0.0, -100.0)], None),
    ],
)
def test_target_has_the_type_of_the_task(
    task_type: LabelType, stored: list[tuple[float, ...]], expected: list[object] | None, tmp_path: Path
) -> None:
    spec = LabelSpec(task_type, () if task_type == "regression" else ("no", "yes"))
    path = tmp_path / "split.tokens"
    labelled(spec, stored, path=path)
    split = label_split(TokenSplit.load(path), spec)
    targets = [split.target(i) for i in range(2)]
    if expected is None:
        expected = [tuple(map(int, target)) for target in stored]
    assert targets == expected
    assert [type(target) for target in targets] == [type(target) for target in expected]
    assert spec.outputs == (1 if task_type == "regression" else 2)


def test_label_counts_are_of_examples_or_of_tokens() -> None:
    single = labelled(LabelSpec("single", ("no", "yes", "never")), [(1.0,), (1.0,)])
    assert single.label_counts_by_name == {"no": 0, "yes": 2, "never": 0}
    multi = labelled(LabelSpec("multi", ("a", "b")), [(1.0, 0.0), (1.0, 1.0)])
    assert multi.label_counts_by_name == {"a": 2, "b": 1}
    tags = labelled(
        LabelSpec("tokens", ("O", "B")), [(-100.0, 1.0, -100.0), (-100.0, 0.0, 0.0, -100.0, 1.0, -100.0)]
    )
    assert tags.label_counts_by_name == {"O": 2, "B": 2}
    assert labelled(LabelSpec("regression"), [(1.0,), (2.0,)]).label_counts_by_name == {}


def test_batch_has_targets_and_token_types_of_labelled_rows_beside_plain_ones() -> None:
    splits = {"label": labelled(LabelSpec("single", ("no", "yes")), [(1.0,), (0.0,)]), "text": plain()}
    rows = [Row(0, "label", 1, 6), Row(1, "text", 0, 4), Row(2, "label", 0, 3)]
    batch = collate(rows, splits.__getitem__, 0)
    assert batch.targets == (0, None, 1)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0] * 6]
    assert batch.inputs["attention_mask"].sum(1).tolist() == [6, 4, 3]
    assert (batch.labels[0] == -100).all()
    assert (batch.labels[2] == -100).all()
    assert batch.labels[1].tolist() == [-100, 2, 3, 4, -100, -100]


def test_batch_of_other_tasks_has_no_new_inputs() -> None:
    batch = collate([Row(0, "text", 0, 4)], {"text": plain()}.__getitem__, 0)
    assert batch.targets is None
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_token_types_are_left_out_where_all_are_zero() -> None:
    split = labelled(LabelSpec("single", ("no", "yes")), [(1.0,), (0.0,)], with_types=False)
    assert split.types(0) is None
    batch = collate([Row(0, "label", 1, 6)], {"label": split}.__getitem__, 0)
    assert "token_type_ids" not in batch.inputs
    assert batch.targets == (0,)
