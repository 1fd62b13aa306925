"""Pairs and triplets: what their texts become, and the rows that are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.config.model_schema import ModelConfig
from flora_train.data.documents import LocatedRow, outline
from flora_train.data.embeddings.rows import EmbeddingRowEncoder
from flora_train.data.embeddings.spec import EmbeddingSpec, embedding_of
from flora_train.data.embeddings.split import EmbeddingSplit, embedding_split
from flora_train.data.split_builder import SplitBuilder
from flora_train.models.loading import load_tokenizer
from tests.embedding_runs import save_tiny_encoder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_encoder(tmp_path_factory.mktemp("model") / "bert")
    return load_tokenizer(ModelConfig(path=str(folder)))


def task_of(**keys: Any) -> Any:
    content = {
        "name": "test",
        "model": {"path": "unused"},
        "tasks": {"t": {"train": "unused.jsonl", "anchor": "a", "positive": "b", **keys}},
        "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
        "mixture": {"examples_per_draw": 4},
        "training": {"steps": 1, "tokens_per_step": 99, "tokens_per_microbatch": 99, "max_length": 8},
    }
    return validate(content).tasks["t"]


def split_of(tokenizer: Any, rows: list[dict[str, Any]], max_length: int = 8, **keys: Any) -> EmbeddingSplit:
    task = task_of(**keys)
    located = [LocatedRow(row, "rows.jsonl", number) for number, row in enumerate(rows, start=1)]
    encoder = EmbeddingRowEncoder(
        task, tokenizer, rows=outline(located), max_length=max_length, key="tasks.t"
    )
    spec = embedding_of(task, 4)
    assert spec is not None
    with SplitBuilder() as builder:
        for example in encoder.encode(located):
            builder.add(example)
        return embedding_split(builder.split(), spec)


def test_texts_are_tokenized_as_by_the_tokenizer_alone(tokenizer: Any) -> None:
    rows = [{"a": "one", "b": "two: x"}, {"a": "three", "b": "much longer than the limit"}]
    split = split_of(tokenizer, rows)
    assert len(split) == 2
    for i, row in enumerate(rows):
        for part, column in enumerate("ab"):
            expected = tokenizer(row[column], truncation=True, max_length=8)["input_ids"]
            assert split.text(i, part).tolist() == expected
            ((tokens, spans),) = split.sequence(i, part)
            assert tokens.tolist() == expected
            assert not len(spans)
    assert split.counts.over_long_truncated == 1
    assert split.longest_row == 8
    assert split.lengths.tolist() == [5 + 8, 7 + 8]
    assert not split.is_packed


def test_triplets_have_three_texts_and_templates_their_own_words(tokenizer: Any) -> None:
    rows = [{"a": "x", "b": "y", "c": "z"}]
    split = split_of(tokenizer, rows, anchor="q: {a}", negative="c")
    assert split.spec == EmbeddingSpec(has_negatives=True, examples_per_draw=4)
    assert tokenizer.decode(split.text(0, 0)) == "[CLS] q :   x [SEP]"
    assert [split.size(0, part) for part in range(3)] == [6, 3, 3]


def test_rows_are_left_out_and_counted(tokenizer: Any) -> None:
    rows = [
        {"a": "x", "b": "y"},
        {"a": "", "b": "y"},
        {"a": "x", "b": "\n "},
        {"a": "Same", "b": "same"},
        {"a": "longer than eight", "b": "longer than nine"},
    ]
    split = split_of(tokenizer, rows)
    assert len(split) == 1
    assert split.counts.empty == 4  # the last two texts are the same once they are cut off
    dropped = split_of(tokenizer, [rows[0], {"a": "longer than eight", "b": "y"}], truncation="drop")
    assert len(dropped) == 1
    assert dropped.counts.over_long_dropped == 1


def test_special_tokens_in_rows_are_text_or_tokens(tokenizer: Any) -> None:
    rows = [{"a": "x [SEP]", "b": "y"}]
    as_text = split_of(tokenizer, rows, max_length=20)
    assert as_text.counts.special_tokens == {"[SEP]": 1}
    assert (as_text.text(0, 0) == tokenizer.sep_token_id).sum() == 1
    as_tokens = split_of(tokenizer, rows, max_length=20, special_tokens=True)
    assert as_tokens.text(0, 0).tolist() == tokenizer(rows[0]["a"])["input_ids"]
    assert (as_tokens.text(0, 0) == tokenizer.sep_token_id).sum() == 2


@pytest.mark.parametrize(
    ("row", "keys", "problem"),
    [
        ({"a": "x"}, {}, "tasks.t.positive = 'b': has no 'b' in rows.jsonl, row 2: give the text"),
        ({"a": "x", "b": "x"}, {}, "tasks.t.positive = 'b': is the same text as anchor in rows.jsonl, row 2"),
        ({"a": "x", "b": {}}, {}, "rows.jsonl, row 2: column 'b' holds a dict"),
        ({"a": "x", "b": "y"}, {"negative": "c"}, "has no 'c' in rows.jsonl, row 2, and all rows of a task"),
        ({"a": "x", "b": "y", "c": " "}, {"negative": "c"}, "is blank in rows.jsonl, row 2, and all rows"),
        (
            {"a": "x", "b": "y", "c": "x"},
            {"negative": "c"},
            "is the same text as anchor in rows.jsonl, row 2",
        ),
        ({"a": "x", "b": "y", "c": "y"}, {"negative": "c"}, "is the same text as positive in rows.jsonl"),
    ],
)
def test_unusable_rows_are_named(
    tokenizer: Any, row: dict[str, Any], keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        split_of(tokenizer, [{"a": "1", "b": "2", "c": "3"}, row], **keys)
    assert problem in str(caught.value)


def test_a_split_in_a_file_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    split = split_of(tokenizer, [{"a": "x", "b": "y z"}, {"a": "u", "b": "v"}])
    split.save(tmp_path / "split.tokens")
    loaded = embedding_split(type(split).__mro__[1].load(tmp_path / "split.tokens"), split.spec)
    assert len(loaded) == 2
    for i in range(2):
        for part in range(2):
            assert np.array_equal(loaded.text(i, part), split.text(i, part))
