"""target_modules: query-key selects the layers that compute queries and keys, in every architecture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.target_groups import query_key_layers
from flora_train.adapters.targets import LIKE_LLAMA, endings, find_targets, linear_layers
from flora_train.config.errors import UserError
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.architectures import ARCHITECTURES, tiny_model
from tests.conftest import spec
from tests.families import FAMILIES, QUICK, family_model
from tests.unit.adapters.helpers import tokens

SEPARATE = ["k_proj", "q_proj"]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"]
FUSED = {
    "c_attn": ("gpt2", "gpt_bigcode"),
    "query_key_value": ("gpt_neox", "bloom", "falcon", "persimmon", "fuyu"),
    "Wqkv": ("mpt", "dbrx"),
    "qkv_proj": ("codegen", "phi3"),
}
OTHER_NAMES: dict[str, list[str]] = {
    **{family: [name] for name, families in FUSED.items() for family in families},
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "longcat_flash"), LATENT),
    **{family: ["key", "query"] for family in ("bert-generation", "xlm-roberta", "electra", "reformer")},
    **{family: ["k", "q"] for family in ("t5", "xlstm")},
    "ctrl": ["Wk", "Wq"],
    "cpmant": ["project_k", "project_q"],
    "git": ["k_proj", "key", "q_proj", "query"],
    "got_ocr2": ["k_proj", "q_proj", "qkv"],
    "minimax": ["k_proj", "q_proj", "qkv_proj"],
    "qwen3_next": ["in_proj_qkvz", "k_proj", "q_proj"],
    "qwen3_5_text": ["in_proj_qkv", "k_proj", "q_proj"],
}
"""model_type -> the layers of the group, where they are not q_proj and k_proj."""
WITHOUT = ("mamba", "falcon_mamba", "mamba2", "rwkv", "jetmoe", "xlnet")
"""Families without linear layers for queries and keys."""
ATTENTIONS = tuple(name for name in ARCHITECTURES if name not in ("t5", "whisper"))


def group(model: nn.Module, **options: Any) -> list[str]:
    return endings(find_targets(model, spec("lora", target_modules="query-key", **options)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_group_of_every_architecture(architecture: str) -> None:
    assert group(tiny_model(architecture)) == OTHER_NAMES.get(architecture, SEPARATE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.quick(*QUICK)
def test_group_of_every_family(family: str) -> None:
    model = family_model(family)
    if family not in WITHOUT:
        assert group(model) == OTHER_NAMES.get(family, SEPARATE)
        return
    message = rf"adapters\.lora\.target_modules = 'query-key': {type(model).__name__} has no layers that are"
    with pytest.raises(UserError, match=f"{message} known to compute queries and keys: list names"):
        group(model)


@pytest.mark.parametrize("architecture", ATTENTIONS)
@torch.no_grad()
def test_group_is_what_the_attention_weights_depend_on(architecture: str) -> None:
    """In the first layer, a change of a layer changes the attention weights if and only if the group has
    it."""
    model: Any = tiny_model(architecture).eval()
    model.set_attn_implementation("eager")
    inputs = tokens(2)

    def attention() -> torch.Tensor:
        return model(inputs, output_attentions=True).attentions[0]

    before = attention()
    names = [name for name in linear_layers(model) if re.search(r"\.0\.", name)]
    effective = set()
    for name in names:
        weight = model.get_submodule(name).weight
        original = weight.clone()
        weight.mul_(torch.linspace(0.5, 1.5, weight.numel()).view_as(weight))
        if not torch.equal(attention(), before):
            effective.add(name)
        weight.copy_(original)
    assert effective == query_key_layers(names)


def test_layers_of_the_same_name_that_are_not_attention_are_left_out() -> None:
    names = ["h.0.mixer.in_proj", "h.0.conv.in_proj", "h.0.attention.self.in_proj", "h.0.feed_forward.key"]
    assert query_key_layers(names) == {"h.0.attention.self.in_proj"}
    assert query_key_layers(["q_proj", "k_proj", "v_proj"]) == {"q_proj", "k_proj"}


def test_group_beside_names_and_below_a_parent() -> None:
    model = tiny_model("llama")
    both = find_targets(model, spec("lora", target_modules=["query-key", "down_proj"]))
    assert endings(both) == ["down_proj", *SEPARATE]
    assert list(both) == [name for name in linear_layers(model) if name in both]
    decoder = spec("lora", target_modules="query-key", parent_module="decoder")
    names = find_targets(tiny_model("whisper"), decoder)
    assert all(name.startswith("model.decoder.") for name in names)
    assert any("encoder_attn" in name for name in names)
    with pytest.raises(UserError, match=r"no target is below it; they are below .*self_attn") as raised:
        find_targets(model, spec("lora", target_modules="query-key", parent_module="mlp"))
    assert "mlp" not in str(raised.value).partition("they are below")[2]


def test_fused_and_separate_projections_of_one_model_are_all_selected() -> None:
    names = ["h.0.attn.c_attn", "h.0.crossattention.q_attn", "h.0.crossattention.c_attn", "h.0.mlp.c_fc"]
    names += ["h.1.attn.q_proj", "h.1.attn.k_proj", "h.1.attn.v_proj", "h.1.attn.qkv_proj"]
    left_out = {"h.0.mlp.c_fc", "h.1.attn.v_proj"}
    assert query_key_layers(names) == {*names} - left_out


@pytest.mark.parametrize(
    ("family", "outputs", "inputs"),
    [
        *((family, ["k_proj", "v_proj"], ["down_proj"]) for family in LIKE_LLAMA),
        ("phi3", ["qkv_proj"], ["down_proj"]),
    ],
)
def test_ia3_defaults_beyond_peft_s_table(family: str, outputs: list[str], inputs: list[str]) -> None:
    targets = find_targets(family_model(family), spec("ia3"))
    assert endings(name for name, target in targets.items() if not target.feedforward) == outputs
    assert endings(name for name, target in targets.items() if target.feedforward) == inputs


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "olmo2", "qwen2"])
def test_ia3_of_the_group_scales_outputs_only(architecture: str) -> None:
    """Also where PEFT's table lacks the architecture, because no feed-forward layer is in the group."""
    model = tiny_model(architecture) if architecture in ARCHITECTURES else family_model(architecture)
    for written in ("query-key", ["query-key"]):
        targets = find_targets(model, spec("ia3", target_modules=written))
        assert not any(target.feedforward for target in targets.values())


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("query_key", "Did you mean 'query-key'?"),
        ("querykey", "Did you mean 'query-key'?"),
        ("all-linear", "To select layers by all-linear, write it without a list."),
    ],
)
def test_misspelt_group_in_a_list_is_corrected(given: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(hint)):
        find_targets(tiny_model("llama"), spec("lora", target_modules=[given]))


@pytest.mark.parametrize("architecture", ["llama", "gpt_bigcode", "gpt_neox", "starcoder2", "whisper"])
@pytest.mark.parametrize("method", ["lora", "flora", "ia3"])
def test_exported_adapters_carry_module_names(architecture: str, method: str, tmp_path: Path) -> None:
    bank = AdapterBank.attach(tiny_model(architecture), [spec(method, target_modules="query-key")])
    (name,) = bank.ids
    export_peft(bank, name, tmp_path, base=BaseModel("base"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == OTHER_NAMES.get(architecture, SEPARATE)
