"""Plain PEFT loads every exported adapter completely, or a warning before training says that it does not."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.export.loadability import Loadability, loadability_of, notes
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel, model_class, task_type_of
from flora_train.export.peft_import import init_from_peft
from flora_train.models.loading import disable_dropout
from flora_train.runtime.manifest import PEFT_WARNING
from tests.architectures import ARCHITECTURES, GROUPED, architecture_config, tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.helpers import logits, tiny_t5, tokens

EXPERTS = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **{key: value for key, value in EXPERTS.items() if key != "head_dim"},
    **ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
STATE = {**GROUPED, "mamba_d_state": 8, "mamba_expand": 2, "mamba_dt_rank": 4}
REWRITTEN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "deepseek_v3": LATENT,
    "deepseek_v2": LATENT,
    "glm4_moe": {**EXPERTS, **ROUTED},
    "glm4_moe_lite": LATENT,
    "dots1": {**EXPERTS, **ROUTED},
    "ernie4_5_moe": {
        **EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "qwen3_next": {
        **EXPERTS,
        **LINEAR,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "afmoe": {**EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
    "solar_open": {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1},
    "exaone_moe": {**EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1},
}
"""Models whose dense or shared feed-forward layers PEFT takes for experts when it loads a LORA."""
AS_THEY_ARE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "mixtral": EXPERTS,
    "olmoe": EXPERTS,
    "gpt_oss": EXPERTS,
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 24},
    "minimax": EXPERTS,
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "jamba": {**EXPERTS, **STATE, "attn_layer_period": 2, "attn_layer_offset": 1},
}
QUICK = ("qwen3_moe", "deepseek_v3", "ernie4_5_moe", "qwen3_next", "mixtral", "jamba")
FAMILIES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.full)
    for name in (*REWRITTEN, *AS_THEY_ARE)
]


def built(family: str) -> tuple[PretrainedConfig, nn.Module]:
    """A random-weight model of this family, the same at every call."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(REWRITTEN | AS_THEY_ARE)[family])
    disable_dropout(config)
    return config, AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def bank_on(model: nn.Module, *specs: AdapterSpec) -> AdapterBank:
    bank = AdapterBank.attach(model, specs)
    perturb(bank)
    return bank


def by_peft(model: nn.Module, folder: Path, x: Tensor, merge: bool = False) -> Tensor:
    """Logits of what any user of PEFT gets."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        adapted: Any = PeftModel.from_pretrained(model, folder).eval()
        return (adapted.merge_and_unload() if merge else adapted)(input_ids=x).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_on_every_layer_of_a_model_of_experts_is_the_same_in_plain_peft(
    family: str, tmp_path: Path
) -> None:
    x = tokens(2)
    bank = bank_on(built(family)[1], spec("lora", rank=4, alpha=3.0), spec("flora", rank=3, variant="pure"))
    said = list(notes(bank.model, bank.pools))
    assert len(said) == (family in REWRITTEN)
    for name, kind in (("task-lora", "ADALORA" if family in REWRITTEN else "LORA"), ("task-flora", "HIRA")):
        folder = export_peft(bank, name, tmp_path / name, base=BaseModel("base"))
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind
        assert not (folder / PEFT_WARNING).exists()
        ours = logits(bank, x, [name, name])
        torch.testing.assert_close(by_peft(built(family)[1], folder, x), ours, rtol=1e-4, atol=1e-4)
        assert (ours - logits(bank, x, [-1, -1])).abs().max() > 0.01


@pytest.mark.parametrize(
    "options",
    [{"rslora": True}, {"target_modules": ["gate_proj"]}, {"target_modules": ["down_proj"]}],
    ids=str,
)
def test_an_adalora_of_any_settings_has_the_numbers_of_its_lora_and_comes_back(
    options: dict[str, Any], tmp_path: Path
) -> None:
    x, ours = tokens(2), spec("lora", rank=3, alpha=5.0, dropout=0.1, **options)
    bank = bank_on(built("qwen3_moe")[1], ours)
    folder = export_peft(bank, "task-lora", tmp_path / "a", base=BaseModel("base"))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "ADALORA"
    expected = logits(bank, x, [0, 0])
    for merge in (False, True):
        torch.testing.assert_close(
            by_peft(built("qwen3_moe")[1], folder, x, merge), expected, rtol=1e-4, atol=1e-4
        )
    again = AdapterBank.attach(built("qwen3_moe")[1], [replace(ours, init_from=str(folder))])
    init_from_peft(again, [0])
    torch.testing.assert_close(again.row(0), bank.row(0), rtol=1e-6, atol=1e-7)


def test_settings_that_peft_refuses_for_some_adapters_of_a_pool_are_seen() -> None:
    """PEFT takes no dropout on a model's experts, and two adapters that differ in it alone are in one
    pool."""
    bank = AdapterBank.attach(
        built("deepseek_v3")[1], [spec("lora", family="plain"), spec("lora", family="dropped", dropout=0.1)]
    )
    assert len(bank.pools) == 1
    said = list(notes(bank.model, bank.pools))
    assert "plain: plain PEFT ignores" in said[0]
    assert "dropped: plain PEFT refuses it as LORA" in said[1]


def test_a_lora_for_other_servers_stays_a_lora_and_says_what_plain_peft_does(tmp_path: Path) -> None:
    bank = bank_on(built("deepseek_v3")[1], spec("lora"))
    folder = export_peft(bank, "task-lora", tmp_path / "a", base=BaseModel("base"), always_lora=True)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "ignores 12 of 32 tensors" in (folder / PEFT_WARNING).read_text()


MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


def test_layers_that_peft_refuses_are_named_before_training_and_in_the_folder(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **MAMBA))
    bank = bank_on(
        model,
        spec("lora", family="all"),
        spec("lora", family="some", target_modules=["in_proj"]),
        spec("flora"),
    )
    (said,) = notes(bank.model, bank.pools)
    assert said.startswith("all: plain PEFT refuses it as LORA")
    assert "out_proj" in said
    assert "--as merged" in said
    warned = {
        name
        for name in bank.ids
        if (export_peft(bank, name, tmp_path / name, base=BaseModel("base")) / PEFT_WARNING).exists()
    }
    assert warned == {"task-all"}
    with pytest.raises(ValueError, match="out_proj"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_config(model.config), tmp_path / "task-all")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_config(model.config), tmp_path / "task-some")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loadability_of_supported_architectures_has_no_warning(architecture: str) -> None:
    model = tiny_model(architecture)
    ia3 = [spec("ia3")] if architecture not in ("whisper",) else []
    bank = AdapterBank.attach(model, [spec("lora"), spec("flora"), *ia3])
    assert list(notes(bank.model, bank.pools)) == []
    known = loadability_of(bank.model)
    assert known.empty_model is not None
    assert all(pool.targets.keys() <= known.names.keys() for pool in bank.pools)


class Renamed(LlamaForCausalLM):
    """A model that renames the tensors of old files, and of ours with them."""

    _checkpoint_conversion_mapping = {"^model": "language_model"}


def test_a_silent_loss_that_no_form_avoids_is_refused_before_training() -> None:
    bank = AdapterBank.attach(Renamed(architecture_config("llama")), [spec("flora")])
    with pytest.raises(
        UserError, match=r"adapters\.flora\.target_modules: plain PEFT ignores 28 of 28 tensors .*HIRA"
    ):
        list(notes(bank.model, bank.pools))


def test_a_model_that_cannot_be_made_from_its_configuration_is_exported_with_a_note_before_training(
    tmp_path: Path,
) -> None:
    class Own(LlamaForCausalLM):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)

    bank = bank_on(Own(architecture_config("llama"), 1), spec("lora"))
    assert Loadability(bank.model).empty_model is None
    (line,) = notes(bank.model, bank.pools)
    assert "it is unknown whether" in line
    assert not (
        export_peft(bank, "task-lora", tmp_path / "a", base=BaseModel("base")) / PEFT_WARNING
    ).exists()


def test_task_type_follows_the_model() -> None:
    bert = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    llama = architecture_config("llama")
    found = {
        "causal": tiny_model("gpt2"),
        "encoder-decoder": tiny_t5(),
        "speech": tiny_model("whisper"),
        "classifier": AutoModelForSequenceClassification.from_config(llama),
        "masked": AutoModelForMaskedLM.from_config(bert),
    }
    assert {name: task_type_of(model) for name, model in found.items()} == {
        "causal": "CAUSAL_LM",
        "encoder-decoder": "SEQ_2_SEQ_LM",
        "speech": None,
        "classifier": None,
        "masked": None,
    }
    sharded = type("FSDPLlamaForCausalLM", (type("FSDPModule", (), {}), LlamaForCausalLM), {})
    assert task_type_of(sharded(llama)) == "CAUSAL_LM"
    assert model_class(sharded(llama)) is LlamaForCausalLM


def test_an_adapter_of_a_classifier_is_the_same_in_plain_peft(tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(architecture_config("llama")).eval()

    x = tokens(2)
    bank = bank_on(classifier(), spec("lora", target_modules=["q_proj", "down_proj"]))
    folder = export_peft(bank, "task-lora", tmp_path / "a", base=BaseModel("base"))
    torch.testing.assert_close(
        by_peft(classifier(), folder, x), logits(bank, x, [0, 0]), rtol=1e-4, atol=1e-5
    )
