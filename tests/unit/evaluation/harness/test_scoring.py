"""Scores of a mixed batch are those of each row and adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import AdapterSpec
from flora_train.evaluation.harness.requests import Answer, TokenPair
from flora_train.evaluation.harness.scoring import Scorer, cut_vocabulary, unique_inputs
from tests.architectures import VOCABULARY
from tests.conftest import FEW, spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.generation.test_complete import model_for

CONTENDERS = (-1, 0, 1, 2)
MAX_LENGTH = 20


ROUTED = (
    spec("mixlora", family="mix", experts=4, rank=2),
    spec("mixlora", family="fmix", expert="flora", experts=3, top_k=1),
    spec("lora", rank=2),
)


def bank_for(
    architecture: str = "llama", paging: Paging | None = None, specs: Sequence[AdapterSpec] = ()
) -> AdapterBank:
    specs = specs or [spec("flora", rank=2), spec("lora", rank=2), spec("ia3")]
    bank = AdapterBank.attach(model_for(architecture, byte_tokenizer()), specs, paging=paging)
    for adapter in range(len(specs)):
        generator = torch.Generator().manual_seed(adapter)
        row = bank.row(adapter)
        row += 0.3 * torch.randn(row.shape, generator=generator)
    bank.invalidate_device()
    return bank


def random_pairs() -> list[TokenPair]:
    """Pairs of many lengths, some too long, and some that differ in the last token or in the border."""
    draws = torch.Generator().manual_seed(0)
    pairs = []
    for context, continuation in [(1, 1), (3, 2), (9, 4), (1, 20), (30, 3), (6, 6), (6, 1)]:
        tokens = torch.randint(0, VOCABULARY, (context + continuation,), generator=draws).tolist()
        pairs.append(TokenPair(tuple(tokens[:context]), tuple(tokens[context:])))
        pairs.append(TokenPair(tuple(tokens[:context]), (*tokens[context:-1], (tokens[-1] + 1) % VOCABULARY)))
    first = pairs[4]
    pairs.append(TokenPair(first.context + first.continuation[:2], first.continuation[2:]))
    return pairs


@torch.no_grad()
def alone(bank: AdapterBank, pair: TokenPair, adapter: int, vocabulary: int | None = None) -> Answer:
    """The answer to one pair, by the definition."""
    tokens = (pair.context + pair.continuation)[-(MAX_LENGTH + 1) :]
    with bank.routed([adapter]):
        logits: Tensor = bank.model(torch.tensor([tokens[:-1]])).logits[0]
    scores = logits[-len(pair.continuation) :, :vocabulary].log_softmax(-1)
    targets = torch.tensor(pair.continuation)
    total = float(scores.gather(1, targets[:, None]).sum())
    return total, bool((scores.argmax(-1) == targets).all())


def scorer_for(bank: AdapterBank, max_tokens: int = 4096, vocabulary: Any = None) -> Scorer:
    bank.model.eval()
    size = bank.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    return Scorer(bank, max_tokens=max_tokens, pad_token=0, vocabulary=vocabulary or (lambda adapter: size))


def assert_alike(found: list[Answer], expected: list[Answer]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)


@pytest.mark.parametrize("architecture", FEW)
@pytest.mark.parametrize("max_tokens", [1, 100, 4096])
def test_scores_are_those_of_each_row_alone(architecture: str, max_tokens: int) -> None:
    bank, pairs = bank_for(architecture), random_pairs()
    found = scorer_for(bank, max_tokens).score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    for adapter in CONTENDERS:
        assert_alike(found[adapter], [alone(bank, pair, adapter) for pair in pairs])
    assert len({found[adapter][0][0] for adapter in CONTENDERS}) == 4


def test_scores_of_routed_adapters_are_those_of_each_row_alone() -> None:
    bank, pairs = bank_for(specs=ROUTED), random_pairs()
    found = scorer_for(bank, 100).score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    for adapter in CONTENDERS:
        assert_alike(found[adapter], [alone(bank, pair, adapter) for pair in pairs])
    assert len({found[adapter][0][0] for adapter in CONTENDERS}) == 4


def test_greedy_continuations_are_recognised_for_each_contender() -> None:
    bank = bank_for()
    bank.model.eval()
    pairs = []
    for adapter in CONTENDERS:
        tokens = [5, 6]
        for _ in range(3):
            with torch.no_grad(), bank.routed([adapter]):
                tokens.append(int(bank.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        pairs.append(TokenPair((5, 6), tuple(tokens[2:])))
    found = scorer_for(bank).score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    for number, adapter in enumerate(CONTENDERS):
        assert found[adapter][number][1]
    assert not all(found[-1][number][1] for number in range(4))


def test_one_forward_pass_answers_all_contenders() -> None:
    bank = bank_for()
    scorer, shapes = scorer_for(bank), []
    bank.model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    pairs = random_pairs()
    inputs = unique_inputs(pairs, MAX_LENGTH)
    assert len(inputs) < len(pairs)
    scorer.score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    assert shapes == [(4 * len(inputs), MAX_LENGTH)]


def test_paged_adapters_score_as_those_on_the_device() -> None:
    pairs = random_pairs()
    expected = scorer_for(bank_for()).score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    found = scorer_for(bank_for(paging=Paging(1))).score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    for adapter in CONTENDERS:
        assert_alike(found[adapter], expected[adapter])


def test_tokens_outside_a_contenders_vocabulary_have_no_probability() -> None:
    bank = bank_for()
    size = bank.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    sizes = {-1: size, 0: 60, 1: 60, 2: 60}
    pairs = [TokenPair((1, 2), (3, 4)), TokenPair((7,), (59, 8, 9))]
    found = scorer_for(bank, vocabulary=sizes.__getitem__).score(pairs, CONTENDERS, max_length=MAX_LENGTH)
    for adapter in CONTENDERS:
        assert_alike(found[adapter], [alone(bank, pair, adapter, sizes[adapter]) for pair in pairs])


def test_a_vocabulary_that_is_large_enough_is_not_copied() -> None:
    logits = torch.zeros(2, 5)
    assert cut_vocabulary(logits, torch.tensor([5, 6])) is logits
    cut = cut_vocabulary(logits, torch.tensor([5, 2]))
    assert cut[1].tolist() == [0.0, 0.0, *[-float("inf")] * 3]
    assert cut[0].tolist() == [0.0] * 5
