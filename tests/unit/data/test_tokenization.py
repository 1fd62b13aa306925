"""What the model sees of an example, what it learns of it, and that nothing disappears uncounted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.data.batch import IGNORE, Row, collate
from flora_train.data.templates import PromptCompletion
from flora_train.data.token_split import SplitCounts, TokenSplit
from flora_train.data.tokenization import check_tokenizer, pad_token, tokenize
from tests.unit.data.conftest import byte_tokenizer

POLICIES = ["truncate", "split", "drop"]


def learnt_text(split: TokenSplit, index: int, tokenizer: Any) -> str:
    """The text of the tokens that `collate` labels."""
    batch = collate(
        [Row(0, "t", index, int(split.lengths[index]))], lambda task: split, tokenizer.pad_token_id
    )
    labels = batch.labels[0]
    return tokenizer.decode(labels[labels != IGNORE])


def test_only_the_completion_and_the_end_token_are_learnt(tokenizer: Any) -> None:
    split = tokenize([PromptCompletion("ab", "cd")], tokenizer, 16, truncation="truncate")
    assert tokenizer.decode(split.example(0)) == "abcd<e>"
    assert learnt_text(split, 0, tokenizer) == "cd<e>"
    assert split.spans.tolist() == [[2, 5]]
    assert split.label_counts.tolist() == [3]


def test_prompt_is_tokenised_separately_as_in_generation() -> None:
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    together, apart = (
        tokenizer("abcd")["input_ids"],
        tokenize([PromptCompletion("ab", "cd")], tokenizer, 16, truncation="truncate"),
    )
    assert apart.example(0).tolist() == [
        *tokenizer("ab")["input_ids"],
        *tokenizer("cd")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert apart.example(0).tolist()[:-1] != together


def test_text_without_a_prompt_is_learnt_but_for_its_unpredictable_first_token(tokenizer: Any) -> None:
    split = tokenize([PromptCompletion("", "abc")], tokenizer, 16, truncation="truncate")
    assert learnt_text(split, 0, tokenizer) == "bc<e>"
    assert split.label_bytes.tolist() == [2]


def test_start_token_of_the_tokenizer_is_read_and_makes_every_token_predictable() -> None:
    tokenizer = byte_tokenizer(start=True)
    split = tokenize(
        [PromptCompletion("", "abc"), PromptCompletion("x", "yz")], tokenizer, 16, truncation="truncate"
    )
    assert [tokenizer.decode(split.example(i)) for i in range(2)] == ["<s>abc<e>", "<s>xyz<e>"]
    assert [learnt_text(split, i, tokenizer) for i in range(2)] == ["abc<e>", "yz<e>"]
    assert split.label_bytes.tolist() == [3, 2]


LONG = PromptCompletion("", "abcdefghij")  # 11 tokens with the end token


@pytest.mark.parametrize(
    ("policy", "texts"),
    [("truncate", ["abcd"]), ("split", ["abc", "defg", "hij<e>"]), ("drop", [])],
)
def test_over_long_example_is_cut_by_policy_and_counted(
    tokenizer: Any, policy: str, texts: list[str]
) -> None:
    split = tokenize([LONG], tokenizer, 4, truncation=policy)
    assert [tokenizer.decode(split.example(i)) for i in range(len(split))] == texts
    counts = split.counts
    assert (counts.over_long_truncated, counts.over_long_split, counts.over_long_dropped) == tuple(
        policy == p for p in POLICIES
    )


def test_end_token_stands_only_where_the_text_ends(tokenizer: Any) -> None:
    exact = tokenize(
        [PromptCompletion("", "abc"), PromptCompletion("", "abcd")], tokenizer, 4, truncation="truncate"
    )
    assert [tokenizer.decode(exact.example(i)) for i in range(2)] == ["abc<e>", "abcd"]


def test_over_long_example_with_a_prompt_keeps_the_prompt_and_is_truncated_even_where_others_are_split(
    tokenizer: Any,
) -> None:
    split = tokenize([PromptCompletion("PQ", "abcdefgh")], tokenizer, 6, truncation="split")
    assert [tokenizer.decode(split.example(i)) for i in range(len(split))] == ["PQabcd"]
    assert (split.counts.over_long_truncated, split.counts.over_long_split) == (1, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("max_length", [5, 7, 16, 64])
def test_counts_add_up_and_lengths_stay_in_bounds(policy: str, start: bool, max_length: int) -> None:
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("ab ü語"), n)) for n in range(30)]
    examples = [PromptCompletion(prompt, text) for text in texts for prompt in ("", "p" * (len(text) % 9))]
    examples += [PromptCompletion("p", ""), PromptCompletion("p", " \n"), PromptCompletion("", "\t")]
    counts = (
        split := tokenize(examples, byte_tokenizer(start), max_length, truncation=policy, unsampled=7)
    ).counts
    assert counts.rows == len(examples) + 7
    assert counts.unsampled == 7
    assert counts.empty >= 3
    if policy == "split":
        assert counts.examples >= counts.rows - counts.unsampled - counts.empty - counts.prompt_too_long
    else:
        used = (
            counts.rows - counts.unsampled - counts.empty - counts.over_long_dropped - counts.prompt_too_long
        )
        assert used == counts.examples
    assert counts.examples == len(split) == len(split.label_bytes)
    assert split.lengths.max() <= max_length
    assert split.label_counts.min() >= 1
    assert counts.tokens == split.lengths.sum() == len(split.tokens)
    assert counts.label_tokens == split.label_counts.sum()


def test_prompt_that_fills_the_length_is_counted_separately(tokenizer: Any) -> None:
    split = tokenize(
        [PromptCompletion("abcd", "e"), PromptCompletion("abc", "e")], tokenizer, 4, truncation="truncate"
    )
    assert split.counts.prompt_too_long == 1
    assert [tokenizer.decode(split.example(i)) for i in range(len(split))] == ["abce"]


def test_characters_that_the_tokenizer_does_not_know_count_as_empty() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={"a": 0, "<e>": 1, "<p>": 2}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<p>")
    counts = tokenize(
        [PromptCompletion("", "aa"), PromptCompletion("", "zz")], tokenizer, 8, truncation="truncate"
    ).counts
    assert (counts.rows, counts.examples, counts.empty) == (2, 1, 1)


TEXT = "naïve 日本語 🙂 end"


@pytest.mark.parametrize("start", [False, True])
def test_label_bytes_are_the_utf8_bytes_of_the_learnt_text(start: bool) -> None:
    split = tokenize(
        [PromptCompletion("prompt", TEXT), PromptCompletion("", TEXT)],
        byte_tokenizer(start),
        64,
        truncation="truncate",
    )
    unpredicted = 0 if start else 1  # the n of naïve
    assert split.label_bytes.tolist() == [len(TEXT.encode()), len(TEXT.encode()) - unpredicted]


@pytest.mark.parametrize("max_length", range(4, 32))
def test_label_bytes_of_the_parts_of_a_text_sum_to_the_text_though_cuts_fall_inside_characters(
    max_length: int,
) -> None:
    split = tokenize([PromptCompletion("", TEXT)], byte_tokenizer(start=True), max_length, truncation="split")
    assert split.label_bytes.sum() == len(TEXT.encode())
    assert split.label_bytes.min() >= 0


@pytest.mark.parametrize("max_length", range(4, 32))
def test_label_bytes_of_a_truncated_text_differ_from_its_tokens_by_less_than_a_character(
    max_length: int,
) -> None:
    split = tokenize(
        [PromptCompletion("", TEXT)], byte_tokenizer(start=True), max_length, truncation="truncate"
    )
    tokens = int(split.label_counts[0]) - (
        split.counts.over_long_truncated == 0
    )  # one token is one byte here
    assert tokens <= split.label_bytes[0] <= tokens + 3


def test_saved_split_loads_equal_and_leaves_no_temporary_file(tokenizer: Any, tmp_path: Path) -> None:
    split = tokenize([LONG, PromptCompletion("a", "b")], tokenizer, 8, truncation="split")
    split.save(tmp_path / "x.tokens")
    again = TokenSplit.load(tmp_path / "x.tokens")
    for name in ("tokens", "offsets", "spans", "span_offsets", "label_bytes"):
        assert np.array_equal(getattr(split, name), getattr(again, name))
        assert getattr(split, name).dtype == getattr(again, name).dtype
    assert split.counts == again.counts
    assert [path.name for path in tmp_path.iterdir()] == ["x.tokens"]


def test_no_examples_make_an_empty_split(tokenizer: Any) -> None:
    split = tokenize([], tokenizer, 8, truncation="truncate", unsampled=2)
    assert len(split) == 0
    assert split.counts == SplitCounts(rows=2, unsampled=2)


def test_tokenizer_without_end_token_is_refused_with_the_fix() -> None:
    with pytest.raises(
        UserError,
        match=r"model.path = 'm': has a tokenizer without an end-of-sequence token: set tokenizer\.",
    ):
        check_tokenizer(SimpleNamespace(eos_token_id=None, pad_token_id=1), "m")


def test_tokenizer_without_padding_token_pads_with_its_end_token_which_is_learnt_all_the_same() -> None:
    tokenizer = byte_tokenizer(start=True)
    tokenizer.pad_token = None
    check_tokenizer(tokenizer, "m")
    assert pad_token(tokenizer) == tokenizer.eos_token_id
    split = tokenize(
        [PromptCompletion("p", "longer text"), PromptCompletion("p", "ab")],
        tokenizer,
        32,
        truncation="truncate",
    )
    rows = [Row(0, "t", i, int(split.lengths[i])) for i in range(2)]
    batch = collate(rows, lambda task: split, pad_token(tokenizer))
    assert tokenizer.decode(batch.labels[1][batch.labels[1] != IGNORE]) == "ab<e>"
    assert batch.inputs["attention_mask"].sum(1).tolist() == split.lengths.tolist()
