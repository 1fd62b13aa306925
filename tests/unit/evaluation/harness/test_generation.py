"""Continuations of a mixed batch are those of transformers' generate with each adapter alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.evaluation.harness.generation import Generator, StopTexts
from flora_train.evaluation.harness.requests import PromptTokens
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.harness.test_scoring import CONTENDERS, bank_for

TEXTS = ["x", "function add(a, b)", "-- sum of a list\n", "return"]


def prompts_for(max_new_tokens: int = 12, stops: tuple[str, ...] = (), **options: Any) -> list[PromptTokens]:
    tokenizer = byte_tokenizer()
    return [
        PromptTokens(tuple(tokenizer(text)["input_ids"]), text, max_new_tokens, stops, options)
        for text in TEXTS
    ]


def generated(
    bank: AdapterBank, prompts: list[PromptTokens], vocabulary: int = 10_000, rows: int = 7
) -> dict[int, list[list[int]]]:
    generator = Generator(bank, byte_tokenizer(), max_rows=rows, vocabulary=lambda adapter: vocabulary)
    return generator.generate(prompts, CONTENDERS)


def by_transformers(bank: AdapterBank, prompt: PromptTokens, adapter: int) -> list[int]:
    ids = torch.tensor([prompt.tokens])
    bank.model.eval()
    with bank.routed([adapter]):
        out = bank.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=prompt.max_new_tokens,
            pad_token_id=0,
            **prompt.options,
        )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": False, "suppress_tokens": list(range(60, 120)), "min_new_tokens": 5},
    ],
    ids=["greedy", "penalties", "suppressed"],
)
def test_continuations_are_those_of_transformers(options: dict[str, Any]) -> None:
    bank, prompts = bank_for(), prompts_for(**options)
    found = generated(bank, prompts)
    for adapter in CONTENDERS:
        assert found[adapter] == [by_transformers(bank, prompt, adapter) for prompt in prompts]
    assert len({tuple(found[adapter][1]) for adapter in CONTENDERS}) == 4


def test_settings_of_the_model_hold_where_a_task_has_none() -> None:
    bank = bank_for()
    plain = generated(bank, prompts_for(do_sample=False))
    bank.model.generation_config.repetition_penalty = 1.5  # type: ignore[union-attr]
    prompts = prompts_for(do_sample=False)
    found = generated(bank, prompts)
    assert found != plain
    for adapter in CONTENDERS:
        assert found[adapter] == [by_transformers(bank, prompt, adapter) for prompt in prompts]


def test_different_settings_are_decoded_separately() -> None:
    bank = bank_for()
    short, long = prompts_for(3, do_sample=False), prompts_for(9, do_sample=False)
    found = generated(bank, [*short, *long])
    for adapter in CONTENDERS:
        assert max(map(len, found[adapter][: len(short)])) <= 3
        assert max(map(len, found[adapter][len(short) :])) > 3


def test_samples_depend_on_their_prompt_only() -> None:
    bank, prompts = bank_for(), prompts_for(do_sample=True, temperature=0.9, top_k=20)
    together = generated(bank, prompts)
    assert together != generated(bank, prompts_for(do_sample=False))
    assert generated(bank, prompts[::-1], rows=3) == {a: rows[::-1] for a, rows in together.items()}
    assert generated(bank, prompts[:1])[1] == together[1][:1]
    warmer = generated(bank, prompts_for(do_sample=True, temperature=3.0, top_k=20))
    assert warmer != together
    likeliest = generated(bank, prompts_for(do_sample=True, temperature=0.9, top_k=1))
    assert likeliest == generated(bank, prompts_for(do_sample=False))


def test_a_continuation_ends_after_a_stop_text() -> None:
    bank, tokenizer = bank_for(), byte_tokenizer()
    free = generated(bank, prompts_for(do_sample=False))
    stop = tokenizer.decode(free[0][1][3:5])
    found = generated(bank, prompts_for(stops=(stop,), do_sample=False))
    for adapter in CONTENDERS:
        for row, whole in zip(found[adapter], free[adapter], strict=True):
            assert whole[: len(row)] == row
            text = tokenizer.decode(row)
            assert stop not in tokenizer.decode(row[:-1])
            assert stop in text or row == whole
    assert len(found[0][1]) <= 5 < len(free[0][1])


def test_a_special_token_can_be_a_stop_text() -> None:
    tokenizer = byte_tokenizer()
    ends = StopTexts(tokenizer, ("<s>", "ab"))
    start = tokenizer.convert_tokens_to_ids("<s>")
    letters = tokenizer("xab")["input_ids"]
    assert ends([letters[0], start])
    assert ends(letters)
    assert not ends(letters[:2])
    assert not StopTexts(tokenizer, ())(letters)


def test_tokens_outside_the_vocabulary_are_not_generated() -> None:
    bank = bank_for()
    found = generated(bank, prompts_for(do_sample=False), vocabulary=100)
    assert max(max(row) for rows in found.values() for row in rows) < 100
    free = generated(bank, prompts_for(do_sample=False))
    assert max(max(row) for rows in free.values() for row in rows) >= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "beam_search is not supported"),
        ({"no_such_option": 1}, "no_such_option = 1: transformers' generate has no such option"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"num_return_sequences": 3, "do_sample": True, "temperature": 1.0}, "set repeats in the task"),
    ],
    ids=["beams", "unknown", "temperature", "samples"],
)
def test_settings_that_are_not_supported_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generated(bank_for(), prompts_for(**options))
