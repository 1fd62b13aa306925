"""Layers that cannot have adapters are found by running the model, and refused if they were named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer_usage import unusable_by_shape, unusable_layers
from flora_train.adapters.targets import linear_layers
from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import empty_model
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import mixed_specs, spec
from tests.families import family_config, family_model


def usable_and_not(model: Any) -> tuple[set[str], dict[str, str]]:
    names = linear_layers(model)
    reasons = unusable_layers(model, names)
    return names.keys() - reasons.keys(), reasons


def test_named_targets_that_do_not_run_are_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"lora\.target_modules = 'dt_proj': no adapter can be attached to .*, which does not run",
    ):
        AdapterBank.attach(family_model("mamba"), [spec("lora", target_modules=["in_proj", "dt_proj"])])


def test_a_name_that_some_layers_run_under_takes_these_alone() -> None:
    bank = AdapterBank.attach(family_model("bart"), [spec("lora", target_modules=["k_proj", "fc1"])])
    assert {name.split(".")[-2] for name in bank.pools[0].targets if "k_proj" in name} == {"self_attn"}


def test_experts_of_single_layers_are_left_out_all_together() -> None:
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "num_experts": 4,
    }
    sizes |= {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "decoder_start_token_id": 0,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("switch_transformers", **sizes))
    usable, reasons = usable_and_not(model)
    assert sum("expert" in name for name in reasons) == 16
    assert not any("expert" in name for name in usable)
    assert any("SelfAttention" in name for name in usable)


class Flattening(nn.Module):
    """A block that puts tokens of all rows in a list, those of one position together: as many as rows of
    tokens, but mixed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        flat = self.inner(x.transpose(0, 1).reshape(-1, width))
        return flat.view(length, rows, -1).transpose(0, 1)


def test_a_layout_that_only_counts_right_is_refused_by_name() -> None:
    model: Any = tiny_model()
    model.model.layers[1].mlp.up_proj = Flattening(model.model.layers[1].mlp.up_proj)
    with pytest.raises(
        UserError,
        match=r"^model = 'LlamaForCausalLM': mixes its rows before model\.layers\.1\.mlp\.up_proj\.inner",
    ):
        AdapterBank.attach(model, [spec("lora")])


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * super().forward(x)


def test_a_layer_that_scales_its_product_is_left_out() -> None:
    model: Any = tiny_model()
    mlp = model.model.layers[1].mlp
    weight, mlp.up_proj = (
        mlp.up_proj.weight,
        Scaled(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False),
    )
    mlp.up_proj.weight = weight
    assert usable_and_not(model)[1] == {
        "model.layers.1.mlp.up_proj": "is a Scaled, which does not compute the product with its weight"
    }


def test_output_layer_is_not_a_target() -> None:
    model: Any = tiny_model("qwen3")
    model.get_output_embeddings = lambda: None  # as of a classifier
    assert usable_and_not(model)[1] == {"lm_head": "makes the logits"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "whisper", "t5", "bloom"])
def test_probe_finds_all_layers_usable_and_changes_nothing(architecture: str) -> None:
    model: Any = tiny_model(architecture).train()
    model.model.layers[0].eval() if architecture == "llama" else None
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert usable_and_not(model)[1] == {}
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_checkpointing_hides_no_gradient() -> None:
    model: Any = tiny_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert len(AdapterBank.attach(model, mixed_specs()).left_out) == 0
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["mamba", "phimoe", "gemma3", "jamba"])
def test_layer_usage_without_weights_is_the_same(name: str, tmp_path: Path) -> None:
    family_config(name).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    found = unusable_by_shape(config, empty_model(config))
    assert found == usable_and_not(family_model(name))[1]
    assert found


def test_embeddings_may_be_changed_in_place() -> None:
    """CTRL multiplies them: with recomputed activations they are a leaf that asks for gradients."""
    model: Any = family_model("ctrl").train()
    bank = AdapterBank.attach(model, [spec("lora", rank=2)])
    ids = torch.randint(2, VOCABULARY, (2, 5))
    with bank.without_adapters():
        model(input_ids=ids).logits.sum().backward()
