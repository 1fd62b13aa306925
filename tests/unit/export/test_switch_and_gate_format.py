"""The folders of switch adapters and of gates: their parts load in plain PEFT, and the lines on their cards
compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.parts import parts_of
from flora_train.config.errors import UserError
from flora_train.export.export_forms import check_forms
from flora_train.export.loadability import notes
from flora_train.export.peft_forms import BaseModel
from flora_train.export.routed_format import export_adapter
from flora_train.export.routed_snippet import loading_lines
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.adapters.gate_reference import FLORAS, IA3S, LORAS, MIXED, gate_spec, randomise
from tests.unit.adapters.helpers import tokens
from tests.unit.export.routed_banks import logits_of, routed_bank, save_base

SWITCHES = {
    "lora": {"experts": 3, "rank": 2},
    "lora one": {"experts": 3, "rank": 2, "top_k": 1},
    "flora": {"expert": "flora", "experts": 3, "rank": 2},
    "ia3": {"expert": "ia3", "experts": 3},
    "some": {"experts": 3, "rank": 2, "target_modules": ["v_proj", "down_proj"]},
}
GATES = {"lora": LORAS, "flora": FLORAS, "ia3": IA3S, "mixed": MIXED}
"""PEFT loads neither members of several methods into one model, nor IA3 that scale other inputs."""


def gate_bank(members: dict[str, Any]) -> AdapterBank:
    """A bank with one gate over members away from the identity."""
    bank = AdapterBank.attach(tiny_model().eval(), [gate_spec(members)])
    randomise(bank)
    return bank


@torch.no_grad()
def loaded_logits(folder: Path, base: Path) -> Tensor:
    """Logits of the model that the card's lines load, in which nothing of this package is imported."""
    names: dict[str, Any] = {}
    method = json.loads((folder / "routing.json").read_text())["method"]
    lines = loading_lines(str(folder), None, repr(str(base)), "AutoTokenizer", method=method)
    exec("\n".join(lines), names)
    return names["model"](input_ids=tokens(3)).logits


def check_folder(bank: AdapterBank, name: str, tmp_path: Path) -> Path:
    """Export an adapter, load each of its parts in plain PEFT and compare the logits."""
    base = save_base("llama", tmp_path / "base")
    folder = export_adapter(bank, name, tmp_path / "adapter", base=BaseModel(str(base)))
    pool, member = bank.location[bank.id_of(name)]
    for part in parts_of(pool, pool.specs[member]):
        model = PeftModel.from_pretrained(tiny_model(), str(folder / part.name))
        assert model.peft_config["default"].peft_type
    assert (loaded_logits(folder, base) - logits_of(bank, name)).abs().max() <= 1e-5
    assert (logits_of(bank, name) - logits_of(bank, "__base__")).abs().max() > 1e-3
    return folder


@pytest.mark.parametrize("options", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_adapter_is_its_experts_and_one_router(tmp_path: Path, options: dict[str, Any]) -> None:
    bank = routed_bank(specs=[spec("switch", "a", "switch", **options)])
    folder = check_folder(bank, "a-switch", tmp_path)
    assert len(load_file(folder / "router.safetensors")) == 1
    assert not list(notes(bank.model, bank.pools))


@pytest.mark.parametrize("as_", ["merged", "lora-svd", "mixlora", "flora"])
def test_forms_that_a_switch_and_a_gate_lack_are_refused(as_: str) -> None:
    """By name, and where the run has no other adapters."""
    specs = [spec("switch", "a", "switch", experts=3), gate_spec(MIXED, "a", "gate")]
    for one in specs:
        with pytest.raises(UserError, match=rf"adapter = '{one.name}': is {one.method}: .*--as peft writes"):
            check_forms(specs, [one.name], as_)
    with pytest.raises(UserError, match=rf"as = '{as_}': .*(use peft|--as peft writes)"):
        check_forms(specs, [], as_)
    check_forms(specs, [], "peft")


@pytest.mark.parametrize("members", GATES.values(), ids=GATES)
def test_a_gate_is_its_members_and_a_router_of_each_layer(tmp_path: Path, members: dict[str, Any]) -> None:
    bank = gate_bank(members)
    name = bank.specs[0].name
    folder = check_folder(bank, name, tmp_path)
    routing = json.loads((folder / "routing.json").read_text())
    assert routing["members"] == list(members)
    assert set(load_file(folder / "router.safetensors")) == set(bank.pools[0].targets)
    assert not list(notes(bank.model, bank.pools))
