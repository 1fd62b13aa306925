"""Rows of preferences as text and as messages: prompts that completions share, labels, and rows left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedExample
from flora_train.data.guess_preferences import guess_preferences
from flora_train.data.preferences.split import PreferenceSplit, preference_split
from flora_train.data.row_encoders import make_row_encoder
from flora_train.data.split_builder import SplitBuilder
from tests.rows import located, outline_of
from tests.unit.data.conftest import byte_tokenizer

USER = {"role": "user", "content": "2 + 2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "five"}
LONG = 200


def encode(rows: list[dict[str, Any]], max_length: int = LONG, **keys: Any) -> list[EncodedExample]:
    task = TaskConfig.model_validate({"train": "unused.jsonl", **keys})
    encoder = make_row_encoder(
        task, byte_tokenizer(), rows=outline_of(rows), max_length=max_length, key="tasks.t"
    )
    return list(encoder.encode(located(rows)))


def split_of(rows: list[dict[str, Any]], max_length: int = LONG, **keys: Any) -> PreferenceSplit:
    builder = SplitBuilder()
    for example in encode(rows, max_length, **keys):
        builder.add(example)
    return preference_split(builder.split(), max_length)


def texts(example: EncodedExample) -> list[tuple[str, str]]:
    """(what is read, what is learnt) of each document."""
    tokenizer = byte_tokenizer()
    parts = []
    for document in example.documents:
        ((begin, end),) = document.spans
        tokens = document.tokens.tolist()
        parts.append((tokenizer.decode(tokens[:begin]), tokenizer.decode(tokens[begin:end])))
    return parts


def test_completions_of_a_pair_continue_the_same_tokens() -> None:
    (example,) = encode([{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "five"}], objective="dpo")
    (prompt, chosen), (other_prompt, rejected) = texts(example)
    assert prompt == other_prompt == "2 + 2 = "
    assert chosen.startswith("4")
    assert rejected.startswith("five")


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, id="explicit"),
        pytest.param({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, id="implicit"),
        pytest.param({"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, id="text-prompt"),
        pytest.param({"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]}, id="prompt-is-the-user"),
        pytest.param({"prompt": [USER], "chosen": "4", "rejected": "five"}, id="text-completions"),
        pytest.param({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, id="repeated"),
    ],
)
def test_every_layout_of_messages_gives_the_same_pair(row: dict[str, Any]) -> None:
    (example,) = encode([row], objective="dpo", chat_template="chatml")
    (expected,) = encode(
        [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}], objective="dpo", chat_template="chatml"
    )
    assert texts(example) == texts(expected)
    (prompt, chosen), (other_prompt, rejected) = texts(example)
    assert prompt == other_prompt
    assert "2 + 2?" in prompt
    assert "4" in chosen
    assert "five" in rejected
    assert "assistant" not in chosen


def test_labelled_completions_of_messages_are_read_in_both_layouts() -> None:
    rows = [
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": [USER], "completion": [BAD], "label": False},
    ]
    separate = encode(rows, objective="kto", chat_template="chatml")
    whole = [{"completion": [*row["prompt"], *row["completion"]], "label": row["label"]} for row in rows]
    together = encode(whole, objective="kto", chat_template="chatml")
    assert [texts(one) for one in separate] == [texts(one) for one in together]
    assert [one.label for one in separate] == [True, False]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "p", "chosen": "same", "rejected": "same"},
            "is the same as 'chosen' in rows.jsonl, row 1",
        ),
        ({"prompt": "p", "chosen": "x", "rejected": None}, "has no 'rejected' in rows.jsonl, row 1"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "3 + 3?"}, BAD]},
            "begin with a turn of the assistant, after the same prompt",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'rejected' holds the prompt only"),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "weight": 1}]},
            "is the same as 'chosen' in rows.jsonl, row 1 once they are tokenized",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "content": None}]},
            "message 2 of 'rejected' (assistant) has no content",
        ),
        (
            {"chosen": [USER, {**BAD, "role": "robot"}], "rejected": [USER, BAD]},
            "message 2 of 'chosen' has the unknown role 'robot'",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, {**BAD, "tool_calls": [{"function": {}}]}]},
            "message 2 of 'rejected' has a tool call without a name",
        ),
        ({"prompt": "p", "chosen": "x", "rejected": ["y"]}, "column 'rejected' holds a list"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, row 1") as error:
        encode([row], objective="dpo", chat_template="chatml" if "prompt" not in row else None)
    assert reason in str(error.value)


def test_long_completions_are_cut_and_long_prompts_left_out() -> None:
    rows = [
        {"prompt": "a", "chosen": "b" * 30, "rejected": "c"},
        {"prompt": "a" * 30, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 30 + "d", "rejected": "b" * 30 + "e"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
    ]
    split = split_of(rows, 12, objective="dpo")
    assert len(split) == 1
    counts = split.counts
    assert (counts.over_long_truncated, counts.prompt_too_long, counts.over_long_dropped) == (1, 1, 1)
    assert counts.empty == 1
    assert split.size(0) == 12


def test_the_row_of_the_kl_term_has_the_prompt_of_one_example_and_the_completion_of_another() -> None:
    rows = [
        {"prompt": f"{letter}?", "completion": letter * 4, "label": letter == "x"}
        for letter in ("x", "y", "z")
    ]
    split = split_of(rows, objective="kto")
    assert not split.is_paired
    ((tokens, spans),) = split.sequence(2, completion_of=0)
    ((own, own_spans),) = split.sequence(2)
    ((other, other_spans),) = split.sequence(0)
    begin = int(own_spans[0, 0])
    assert tokens.tolist() == [*own[:begin], *other[other_spans[0, 0] :]]
    assert spans.tolist() == [[begin, len(tokens)]]
    assert split.size(2, completion_of=0) == len(tokens)
    assert split.kl_lengths.tolist() == [split.size(i, completion_of=split.partner(i)) for i in range(3)]
    assert np.array_equal(split.learnt_counts(0), [split.learnt(i) for i in range(3)])


def test_a_supervised_task_of_pairs_has_both_completions_for_its_evaluation() -> None:
    rows = [{"prompt": "p ", "chosen": "yes", "rejected": "no"}]
    assert texts(encode(rows, objective="sft")[0]) == texts(encode(rows, objective="dpo")[0])
    (plain,) = encode([{"prompt": "p ", "completion": "yes"}], objective="sft")
    assert len(plain.documents) == 1


@pytest.mark.parametrize(
    ("row", "objective", "holds_messages"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "dpo", False),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 1}, "dpo", True),
        ({"prompt": "p", "completion": "a", "label": True}, "kto", False),
        ({"prompt": "p", "completion": "a", "label": "lua"}, None, False),
        ({"text": "a"}, None, False),
    ],
)
def test_preferences_are_guessed_by_their_columns(
    row: dict[str, Any], objective: str | None, holds_messages: bool
) -> None:
    guessed = guess_preferences([row] * 3)
    assert (guessed is None) == (objective is None)
    if guessed is not None:
        assert guessed.keys == {"objective": objective}
        assert guessed.holds_messages == holds_messages
        assert set(guessed.used) == row.keys() - {"score"}


@pytest.mark.parametrize(("name", "value"), [("packing", True), ("truncation", "split")])
def test_pairs_whose_chosen_completion_is_learnt_have_no_keys_of_text(name: str, value: Any) -> None:
    """Whether rows are pairs is not known before they are read."""
    text = encode([{"text": "4"}], objective="sft", **{name: value})
    assert [example.fate for example in text] == ["whole"]
    with pytest.raises(UserError, match=rf"tasks\.t\.{name} = "):
        encode([{"prompt": "2 + 2 = ", "chosen": "4", "rejected": "five"}], objective="sft", **{name: value})
