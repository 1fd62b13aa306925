"""Routed adapters generate in a mixed batch, with a KV cache, what each row generates alone without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.merged import mergeable_modules
from flora_train.evaluation.generation import Decoder, Generated, MergedDecoding, Request, Sampling
from tests.conftest import perturb, spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.generation.test_complete import PROMPTS, model_for

GREEDY = Sampling(0.0, 1.0, 0)
TOKENS = 12


def routed_bank(architecture: str) -> AdapterBank:
    specs = [
        spec("mixlora", family="mix", experts=4, rank=2, jitter=0.3),
        spec("mixlora", family="fmix", expert="flora", experts=3, rank=2, top_k=1),
        spec("mixlora", family="imix", expert="ia3", experts=3, top_k=3, top_p=0.5),
        spec("lora", rank=2),
        spec("flora", rank=2),
    ]
    bank = AdapterBank.attach(model_for(architecture, byte_tokenizer()), specs)
    perturb(bank, 0.3)
    return bank


def decode(bank: AdapterBank, requests: list[Request], merging: MergedDecoding | None = None) -> list[str]:
    texts: dict[Any, str] = {}
    decoder = Decoder(
        bank.model,
        byte_tokenizer(),
        bank.routed,
        sampling=GREEDY,
        max_new_tokens=TOKENS,
        max_rows=6,
        merging=merging,
    )

    def report(generated: Generated) -> None:
        texts[generated.request] = generated.text

    decoder.run(requests, report)
    return [texts[i] for i in range(len(requests))]


@torch.no_grad()
def alone_without_cache(bank: AdapterBank, request: Request) -> str:
    """Every token from the whole text before it, in a batch of its own."""
    tokenizer = byte_tokenizer()
    prompt = tokenizer(request.prompt)["input_ids"]
    ids = list(prompt)
    bank.model.eval()
    with bank.routed([request.adapter]):
        for _ in range(TOKENS):
            logits = bank.model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_texts_in_a_mixed_batch_equal_those_one_by_one(architecture: str) -> None:
    bank = routed_bank(architecture)
    adapters = [*range(len(bank.specs)), -1]
    requests = [Request(adapter, prompt, ("",)) for prompt in PROMPTS[:2] for adapter in adapters]
    texts = decode(bank, requests)
    assert texts == [alone_without_cache(bank, request) for request in requests]
    assert len(set(texts)) > len(adapters)


def test_merged_decoding_leaves_routed_adapters_as_they_are() -> None:
    bank = routed_bank("llama")
    assert all(not mergeable_modules(bank, bank.ids[f"task-{name}"]) for name in ("mix", "fmix", "imix"))
    assert mergeable_modules(bank, bank.ids["task-lora"])
    requests = [Request(adapter, PROMPTS[0], ("",)) for adapter in (0, 0, 0)]
    merging = MergedDecoding(bank)
    assert decode(bank, requests, merging) == decode(bank, requests)
    assert merging.merged is None or not merging.merged.layers
