"""Families of causal models: trained correctly, or refused or reduced with one clear line before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer_usage import describe_left_out
from flora_train.config.errors import UserError
from flora_train.evaluation.generation import complete
from flora_train.evaluation.generation.batching_mode import batching_mode
from flora_train.training.row_check import check_rows
from tests.conftest import perturb, spec
from tests.families import FAMILIES, QUICK, family_model
from tests.unit.data.conftest import byte_tokenizer

ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in FAMILIES]
TRAINED = [param for param in ALL if not FAMILIES[str(param.values[0])].refused]


def attached(name: str, **more: Any) -> AdapterBank:
    return AdapterBank.attach(family_model(name, **more), [spec("lora", rank=2), spec("flora", rank=2)])


@pytest.mark.parametrize("name", ALL)
def test_a_family_is_refused_by_name_or_its_useless_layers_are_left_out(name: str) -> None:
    family = FAMILIES[name]
    if family.refused:
        with pytest.raises(UserError, match=family.refused) as caught:
            check_rows(attached(name).model, pad_token=0)
        assert type(family_model(name)).__name__ in str(caught.value)
        return
    bank = attached(name)
    check_rows(bank.model, pad_token=0)
    usable = [module for pool in bank.pools for module in pool.targets]
    words = describe_left_out(bank.left_out, usable)
    assert family.left_out in words
    assert bool(bank.left_out) == bool(family.left_out), words
    assert bank.left_out.keys().isdisjoint(usable)


@pytest.mark.parametrize("name", TRAINED)
def test_every_target_learns_and_an_adapter_learns_as_if_alone(name: str) -> None:
    bank = attached(name)
    perturb(bank, 0.05)
    ids = torch.randint(2, 97, (4, 4), generator=torch.Generator().manual_seed(1))  # as many rows as tokens
    gradients = []
    for rows, adapters in ((slice(0, 4), [0, 1, 0, -1]), (slice(0, 4, 2), [0, 0])):
        bank.pools[0].gradients.zero_()
        bank.route(adapters)
        logits = bank.model(
            input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]), use_cache=False
        ).logits.float()
        mine = torch.tensor([adapter == 0 for adapter in adapters])
        logits.log_softmax(-1)[mine].square().sum().backward()
        gradients.append(bank.gradient_row(0).clone())
    together, alone = gradients
    assert (together - alone).norm() <= 1e-3 * alone.norm()
    pool = bank.location[0][0]
    layout = pool.layout
    learning = {
        module: float(together[layout[module]["B"][0] :][: layout[module]["B"][1][0]].abs().sum())
        for module in pool.targets
    }
    assert sum(size > 0 for size in learning.values()) >= 0.8 * len(learning), learning


@pytest.mark.parametrize("name", TRAINED)
def test_mixed_texts_are_those_of_the_models_own_generate(name: str) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    model: Any = family_model(
        name, **({"text_config": sizes} if name in ("gemma3", "got_ocr2", "fuyu") else sizes)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id
    )  # without forced tokens, as ours
    bank = AdapterBank.attach(model, [spec("lora", rank=2)])
    perturb(bank, 0.3)
    assert batching_mode(model) == FAMILIES[name].batching
    prompts = ["function add(a, b)", "x", "return"]
    mixed = complete(
        model,
        bank,
        tokenizer,
        requests=[(prompt, adapter) for prompt in prompts for adapter in (0, -1)],
        max_new_tokens=6,
    )
    assert len(set(mixed)) > 2
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        for adapter in (0, -1):
            with bank.routed([adapter]):
                written = _written(model, ids, FAMILIES[name].batching)
            assert mixed[2 * i - adapter] == tokenizer.decode(written, skip_special_tokens=True)


@torch.no_grad()
def _written(model: Any, ids: torch.Tensor, batching: str) -> torch.Tensor:
    """Six tokens, by the model's own generate; by its forward where its generate does not give what that
    gives."""
    if batching != "uncached":
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": byte_tokenizer().pad_token_id}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
    begin = ids.shape[1]
    while ids.shape[1] < begin + 6 and int(ids[0, -1]) != byte_tokenizer().eos_token_id:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, begin:]
