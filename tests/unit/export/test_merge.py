"""A merged model is a plain transformers model with the outputs of the adapted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer import AdapterLinear
from flora_train.config.errors import UserError
from flora_train.export.merge import merge_into_base, save_merged
from tests.architectures import tiny_model
from tests.conftest import FEW, spec
from tests.unit.adapters.helpers import logits, plain_logits, tokens
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.export.test_peft_format import perturbed_bank
from tests.unit.training.small_disk import file_size_limit


@pytest.mark.parametrize("family", ["pure", "residual", "rslora", "ia3_explicit"])
@pytest.mark.parametrize("architecture", FEW)
def test_transformers_loads_the_merged_model_and_computes_our_logits(
    tmp_path: Path, architecture: str, family: str
) -> None:
    """Not to the last bit: W0 * M is rounded to float32 once more than x (W0 * M) inside one kernel, and LoRA
    and IA3 multiply in another order. That is 1e-7 a layer; 1e-4 of the logits leaves room for the depth."""
    bank, x = perturbed_bank(architecture), tokens(3)
    name = f"task-{family}"
    ours = logits(bank, x, [name] * len(x))
    folder = save_merged(bank, name, tmp_path / "new" / "merged", preprocessors=[byte_tokenizer()])
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = merged(x).logits
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()
    assert (ours - plain_logits(architecture, x)).abs().max() > 50 * (theirs - ours).abs().max()
    assert set(merged.state_dict()) == set(tiny_model(architecture).state_dict())
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]


@pytest.mark.parametrize("shared", ["weight", "layer"])
def test_a_weight_that_stands_in_two_places_is_not_merged(shared: str) -> None:
    model: Any = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers[:2])
    if shared == "layer":
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight = first.up_proj.weight
    bank = AdapterBank.attach(model, [spec("lora", rank=2, target_modules="all-linear")])
    before = first.up_proj.base_layer.weight.clone()
    with pytest.raises(
        UserError, match=r"^as = 'merged': model\.layers\.\d\.mlp\.up_proj shares its weight with"
    ):
        merge_into_base(bank, bank.specs[0].name)
    assert torch.equal(first.up_proj.base_layer.weight, before)


def test_merging_removes_adapter_layers_and_changes_no_other_layer() -> None:
    bank = perturbed_bank("llama")
    targets = set(bank.pools[bank_pool(bank, "task-lora_subset")].targets)
    model = merge_into_base(bank, "task-lora_subset")
    assert not any(isinstance(module, AdapterLinear) for module in model.modules())
    plain = tiny_model("llama").state_dict()
    changed = {
        name.removesuffix(".weight")
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, plain[name])
    }
    assert changed == targets


def bank_pool(bank: AdapterBank, name: str) -> int:
    return bank.pools.index(bank.location[bank.ids[name]][0])


def test_merging_refuses_a_folder_that_exists(tmp_path: Path) -> None:
    bank, x = perturbed_bank("llama"), tokens(2)
    (tmp_path / "notes").write_text("mine")
    before = logits(bank, x, [0, 1])
    with pytest.raises(UserError, match="exists already: choose another"):
        save_merged(bank, "task-pure", tmp_path, preprocessors=[byte_tokenizer()])
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert torch.equal(logits(bank, x, [0, 1]), before)


def test_merging_an_unknown_adapter_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'task-pure'"):
        save_merged(
            perturbed_bank("llama"), "task-pur", tmp_path / "merged", preprocessors=[byte_tokenizer()]
        )
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_half_model(tmp_path: Path) -> None:
    with file_size_limit(50_000), pytest.raises(UserError, match="merged: the disk is full"):
        save_merged(
            perturbed_bank("llama"), "task-pure", tmp_path / "merged", preprocessors=[byte_tokenizer()]
        )
    assert list(tmp_path.iterdir()) == []
