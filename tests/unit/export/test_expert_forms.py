"""Adapters on fused experts in plain PEFT, in our own form, and merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.export.expert_forms import OWN_TYPE
from flora_train.export.export_forms import check_forms, possible_names
from flora_train.export.loadability import notes
from flora_train.export.merge import merge_into_base
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.runtime.manifest import PEFT_WARNING
from tests.architectures import MIXTURES, tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.helpers import logits, tokens
from tests.unit.adapters.test_expert_parameters import BOTH, ON_EXPERTS, expert_specs

LAYOUTS = [
    pytest.param({}, id="both"),
    pytest.param(
        {"rank_pattern": {"experts.down_proj": 5}, "alpha_pattern": {"gate_up_proj": 9.0}}, id="ranks"
    ),
    pytest.param({"target_parameters": BOTH[:1], "rslora": True}, id="up"),
    pytest.param({"target_parameters": ["layers.1.mlp.experts.down_proj"]}, id="down-of-a-layer"),
    pytest.param({"target_modules": ["q_proj", "o_proj"]}, id="beside-attention"),
]


def bank_on(architecture: str, *specs: AdapterSpec) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model(architecture).eval(), specs)
    perturb(bank)
    return bank


def by_peft(model: nn.Module, folder: Path, x: Tensor) -> Tensor:
    """Logits of what any user of PEFT gets."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        adapted: Any = PeftModel.from_pretrained(model, folder).eval()
        return adapted(input_ids=x).logits


@pytest.mark.parametrize("options", LAYOUTS)
@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.quick(*[f"{name}-both" for name in MIXTURES], "gpt_oss-ranks", "qwen3_moe-beside-attention")
def test_a_lora_on_experts_is_the_same_in_plain_peft(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    x = tokens(2)
    bank = bank_on(architecture, spec("lora", rank=3, alpha=4.0, **{**ON_EXPERTS, **options}))
    assert list(notes(bank.model, bank.pools)) == []
    folder = export_peft(bank, "task-lora", tmp_path / "a", base=BaseModel("base"))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (folder / PEFT_WARNING).exists()
    ours = logits(bank, x, [0, 0])
    theirs = by_peft(tiny_model(architecture).eval(), folder, x)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - logits(bank, x, [-1, -1])).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_an_adapter_merged_into_experts_equals_the_adapter(architecture: str) -> None:
    x = tokens(2)
    for adapter in expert_specs():
        bank = bank_on(architecture, *expert_specs())
        name = adapter.name
        expected = logits(bank, x, [name, name])
        model: Any = merge_into_base(bank, name)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=x).logits, expected, rtol=1e-4, atol=2e-6)
        names = dict(tiny_model(architecture).named_parameters()).keys()
        assert dict(model.named_parameters()).keys() == names


def test_methods_that_peft_has_no_form_for_are_written_in_our_own_and_say_so(tmp_path: Path) -> None:
    specs = [
        spec("flora", rank=3, variant="pure", **{**ON_EXPERTS, "target_modules": ["q_proj"]}),
        spec("ia3", **ON_EXPERTS),
    ]
    bank = bank_on("mixtral", *specs)
    said = list(notes(bank.model, bank.pools))
    assert [note.partition(":")[0] for note in said] == ["flora", "ia3"]
    assert all("PEFT has no fLoRA and no IA3 on the weights of fused experts" in note for note in said)
    assert all("--as merged" in note and "target_parameters" in note for note in said)
    for name in bank.ids:
        folder = export_peft(bank, name, tmp_path / name, base=BaseModel("base"))
        assert "PEFT has no fLoRA" in (folder / PEFT_WARNING).read_text()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == OWN_TYPE
        assert config["target_parameters"] == ["down_proj", "gate_up_proj"]
        written = load_file(folder / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in written.values()) == bank.row(bank.id_of(name)).numel()
        with pytest.raises((KeyError, ValueError, TypeError)):
            PeftModel.from_pretrained(tiny_model("mixtral"), folder)


def test_the_closest_lora_of_an_adapter_on_experts_is_refused() -> None:
    bank = bank_on("mixtral", spec("flora", **ON_EXPERTS), spec("lora", target_modules=["q_proj"]))
    with pytest.raises(UserError, match="has target_parameters, on which no closest LoRA is computed"):
        check_forms(bank.specs, ["task-flora"], "lora-svd")
    assert possible_names(bank.specs, "lora-svd") == ["task-lora"]
