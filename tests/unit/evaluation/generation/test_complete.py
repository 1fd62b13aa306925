"""Every prompt of a mixed batch gets the completion that its adapter alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.evaluation.generation import Decoder, Request, Sampling, complete
from flora_train.evaluation.generation.batching_mode import batching_mode
from tests.architectures import architecture_config
from tests.conftest import perturb, spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.data.many_tokenizers import KINDS

PROMPTS = ["x", "function add(a, b)", "-- sum of a list\n", "local t = {}", "return"]


def model_for(architecture: str, tokenizer: Any) -> nn.Module:
    """A tiny model whose next token depends on what it read: random weights as they come repeat one token."""
    torch.manual_seed(0)
    config = architecture_config(architecture)
    sizes = {
        **config.to_dict(),
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = AutoModelForCausalLM.from_config(type(config)(**{**sizes, "tie_word_embeddings": False}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wp" not in name:
                parameter.mul_(8.0)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_mixed_batch_completes_as_one_request_at_a_time(architecture: str) -> None:
    tokenizer = byte_tokenizer()
    bank = AdapterBank.attach(
        model_for(architecture, tokenizer), [spec("flora", rank=2), spec("lora", rank=2), spec("ia3")]
    )
    perturb(bank, 0.3)
    requests = [(prompt, adapter) for prompt in PROMPTS for adapter in (2, -1, 0, 1)]
    mixed = complete(bank.model, bank, tokenizer, requests=requests, max_new_tokens=12)
    assert mixed == [
        complete(bank.model, bank, tokenizer, requests=[request], max_new_tokens=12)[0]
        for request in requests
    ]
    assert len(set(mixed)) > len(PROMPTS)
    per_prompt = [mixed[i : i + 4] for i in range(0, len(mixed), 4)]
    assert sum(len(set(texts)) == 4 for texts in per_prompt) >= 3  # the contenders write different things


def test_base_requests_complete_as_the_plain_model() -> None:
    tokenizer = byte_tokenizer()
    bank = AdapterBank.attach(model_for("llama", tokenizer), [spec("lora")])
    perturb(bank)
    plain: Any = model_for("llama", tokenizer).eval()
    for prompt, text in zip(
        PROMPTS,
        complete(
            bank.model, bank, tokenizer, requests=[(prompt, -1) for prompt in PROMPTS], max_new_tokens=9
        ),
        strict=True,
    ):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert text == tokenizer.decode(written, skip_special_tokens=True)


def test_completion_restores_training_mode_and_routing() -> None:
    tokenizer = byte_tokenizer()
    bank = AdapterBank.attach(model_for("llama", tokenizer), [spec("lora")])
    bank.model.train()
    complete(bank.model, bank, tokenizer, requests=[("x", 0)], max_new_tokens=2)
    assert bank.model.training
    assert bank.router.routing is None


@pytest.mark.parametrize("kind", ["unigram-first", "legacy-llama"])
def test_a_completion_keeps_its_leading_space(kind: str) -> None:
    tokenizer = KINDS[kind]()
    words = [
        i
        for i, piece in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        if piece[:1] in ("\u2581", "b")
    ]

    def model_of_words() -> Any:
        model: Any = model_for("llama", tokenizer)
        head = model.get_output_embeddings().weight.data
        head[[i for i in range(len(tokenizer)) if i not in words]] = 0  # never the likeliest
        return model

    bank = AdapterBank.attach(model_of_words(), [spec("lora")])
    plain = model_of_words().eval()
    prompts = [f"{first} ab{last}" for first in "abct4x" for last in (":", "", "4", "the")]
    spaced = 0
    for prompt, text in zip(
        prompts,
        complete(bank.model, bank, tokenizer, requests=[(p, -1) for p in prompts], max_new_tokens=9),
        strict=True,
    ):
        ids = torch.tensor([[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        written = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[
            0
        ]
        read, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0], written))
        assert read + text == whole
        spaced += text.startswith(" ")
    assert spaced  # some completion begins with one


def test_special_tokens_are_tokens_in_a_recipes_prompt_and_text_in_a_problems() -> None:
    tokenizer = byte_tokenizer(start=True)
    bank = AdapterBank.attach(model_for("llama", tokenizer), [spec("lora")])
    decoder = Decoder(bank.model, tokenizer, bank.routed, sampling=Sampling(0.0, 1.0, 0), max_new_tokens=3)
    assert batching_mode(bank.model) == "batched"  # asked before, for that runs the model, too
    read: list[int] = []
    bank.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: read.append(args[0].shape[1])
    )
    for special in (True, False):
        decoder.run([Request(-1, "<s>x<e>", ("",), special_tokens=special)], lambda generated: None)
    assert [length for length in read if length > 1] == [3, 8]  # <s> x <e>; the start token and seven letters
