"""MixLoRA's published layout: written so that package mixlora 0.2.3 computes the same, and read again."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.routed.init_from import read_source
from flora_train.config.errors import UserError
from flora_train.export.mixlora_format import check_settings, export_mixlora
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from tests.conftest import spec
from tests.unit.adapters.helpers import tokens
from tests.unit.export.routed_banks import logits_of, routed_bank, save_base

NAME = "a-mix"
SETTINGS: dict[str, Any] = {"experts": 3, "rank": 2, "alpha": 3.0, "rslora": True, "balance_loss": 0.2}


def exported(tmp_path: Path, architecture: str = "llama", **options: Any) -> Path:
    bank = routed_bank(architecture, [spec("mixlora", "a", "mix", **{**SETTINGS, **options})])
    return export_mixlora(bank, NAME, tmp_path / "published", base=BaseModel("tiny"))


def test_the_files_have_the_names_that_the_package_reads(tmp_path: Path) -> None:
    """Names and shapes are those that model.py of the package takes from the file, written out."""
    folder = exported(tmp_path, jitter=0.1, dropout=0.3)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "MIXLORA"
    assert (config["routing_strategy"], config["num_experts"], config["top_k"]) == ("mixlora", 3, 2)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3, True)
    assert (config["router_aux_loss_coef"], config["jitter_noise"]) == (0.2, 0.0)
    assert 0 < config["lora_dropout"] < 1e-6
    assert config["act_fn"] == "silu"
    attention, block = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert config["target_modules"] == dict.fromkeys((*attention, *block), True)
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    expected = set()
    for layer in range(2):
        start = f"mixlora.layers.{layer}"
        expected.add(f"{start}.mlp.moe_gate.weight")
        stems = [f"{start}.self_attn.{module}" for module in attention]
        stems += [f"{start}.mlp.{module}.experts.{expert}" for module in block for expert in range(3)]
        expected |= {f"{stem}.lora_{factor}.weight" for stem in stems for factor in "AB"}
    assert tensors.keys() == expected
    assert tensors["mixlora.layers.0.mlp.moe_gate.weight"].shape == (3, 32)
    assert tensors["mixlora.layers.1.mlp.down_proj.experts.2.lora_A.weight"].shape == (2, 48)
    assert tensors["mixlora.layers.1.mlp.down_proj.experts.2.lora_B.weight"].shape == (32, 2)


@pytest.mark.skipif(find_spec("mixlora") is None, reason="package mixlora (extra `mixlora`) is not installed")
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_package_computes_the_same_logits(tmp_path: Path, architecture: str) -> None:
    from mixlora import MixLoraModelForCausalLM

    bank = routed_bank(architecture, [spec("mixlora", "a", "mix", **SETTINGS)])
    base = save_base(architecture, tmp_path / "base")
    folder = export_mixlora(bank, NAME, tmp_path / "published", base=BaseModel(str(base)))
    model, _ = MixLoraModelForCausalLM.from_pretrained(str(folder))
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens(3)).logits
    assert (theirs - logits_of(bank, NAME)).abs().max() <= 1e-5
    assert (theirs - logits_of(bank, "__base__")).abs().max() > 1e-3


def test_a_routed_adapter_starts_from_the_published_layout(tmp_path: Path) -> None:
    bank = routed_bank("llama", [spec("mixlora", "a", "mix", **SETTINGS)])
    folder = export_mixlora(bank, NAME, tmp_path / "published", base=BaseModel("tiny"))
    other = routed_bank("llama", [spec("mixlora", "a", "mix", init_from=str(folder), **SETTINGS)])
    init_from_peft(other, [0])
    assert torch.equal(other.row(0), bank.row(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing_strategy": "mixlora-switch"}, "only mixlora can be read"),
        ({"use_dora": True}, "experts of DoRA"),
        ({"expert_lora": {"r": 4}}, "another r than its attention adapters"),
        ({"num_experts": 4}, "no tensors of expert 3"),
        ({"r": 3}, "does not allow"),
        ({"top_k": 5}, "top_k is 5 of 3 experts"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = exported(tmp_path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read_source(str(file.parent), "adapters.mix.init_from")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": "flora", "experts": 2}, "experts of flora"),
        ({"top_p": 0.5}, "top_p 0.5"),
        ({"alpha": 2.5}, "alpha 2.5"),
    ],
)
def test_settings_that_the_layout_lacks_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(spec("mixlora", "a", "mix", **options))


def test_layers_that_the_layout_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a base of type gpt2"):
        exported(tmp_path, "gpt2")
    with pytest.raises(UserError, match="adapts down_proj in some layers only"):
        exported(tmp_path, layers_to_transform=[1])
    assert not list(tmp_path.iterdir())
