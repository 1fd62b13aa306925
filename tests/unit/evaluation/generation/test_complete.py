"""Does every prompt of a mixed batch get the completion that its adapter alone would give it?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.evaluation.generation import complete
from tests.architectures import architecture_config
from tests.conftest import perturb, spec
from tests.unit.data.conftest import byte_tokenizer

PROMPTS = ["x", "function add(a, b)", "-- sum of a list\n", "local t = {}", "return"]


def model_for(architecture: str, tokenizer: Any) -> nn.Module:
    """A tiny model whose next token depends on what it read: random weights as they come repeat one token."""
    torch.manual_seed(0)
    config = architecture_config(architecture)
    sizes = {**config.to_dict(), "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(type(config)(**{**sizes, "tie_word_embeddings": False}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wp" not in name:
                parameter.mul_(8.0)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_mixed_batch_completes_as_one_request_at_a_time(architecture: str) -> None:
    tokenizer = byte_tokenizer()
    bank = AdapterBank.attach(model_for(architecture, tokenizer), [spec("flora", rank=2), spec("lora", rank=2), spec("ia3")])
    perturb(bank, 0.3)
    requests = [(prompt, adapter) for prompt in PROMPTS for adapter in (2, -1, 0, 1)]
    mixed = complete(bank.model, bank, tokenizer, requests, 12)
    assert mixed == [complete(bank.model, bank, tokenizer, [request], 12)[0] for request in requests]
    assert len(set(mixed)) > len(PROMPTS)
    per_prompt = [mixed[i : i + 4] for i in range(0, len(mixed), 4)]
    assert sum(len(set(texts)) == 4 for texts in per_prompt) >= 3  # the contenders write different things


def test_base_requests_complete_as_the_plain_model() -> None:
    tokenizer = byte_tokenizer()
    bank = AdapterBank.attach(model_for("llama", tokenizer), [spec("lora")])
    perturb(bank)
    plain: Any = model_for("llama", tokenizer).eval()
    for prompt, text in zip(PROMPTS, complete(bank.model, bank, tokenizer, [(prompt, -1) for prompt in PROMPTS], 9), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(written, skip_special_tokens=True)


def test_completion_leaves_training_mode_and_routing_as_they_were() -> None:
    tokenizer = byte_tokenizer()
    bank = AdapterBank.attach(model_for("llama", tokenizer), [spec("lora")])
    bank.model.train()
    complete(bank.model, bank, tokenizer, [("x", 0)], 2)
    assert bank.model.training
    assert bank.router.routing is None
