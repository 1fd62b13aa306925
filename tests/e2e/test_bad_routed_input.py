"""Wrong settings of routed adapters end the command `train` with one line that names key, value and fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.config.model_schema import ModelConfig
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.models.base_identity import base_identity
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.e2e.test_bad_input import Complain, complain, model
from tests.unit.data.conftest import byte_tokenizer

__all__ = ["complain", "model"]

SETTINGS = {
    "top_k above the experts": (
        "{method: mixlora, lr: 1e-3, experts: 4, top_k: 5}",
        r"adapters\.x\.top_k = 5: is more than the 4 experts: lower it",
    ),
    "top_k above the experts of a switch": (
        "{method: switch, lr: 1e-3, experts: 2, top_k: 3}",
        r"adapters\.x\.top_k = 3: is more than the 2 experts: lower it",
    ),
    "top_k above the members": (
        "{method: meteora, lr: 1e-3, over: [one, two], top_k: 3}",
        r"adapters\.x\.top_k = 3: is more than the 2 adapters in over: lower it",
    ),
    "unknown experts": (
        "{method: mixlora, lr: 1e-3, expert: dora}",
        r"adapters\.x\.expert = 'dora': must be flora, ia3 or lora.*",
    ),
    "unknown experts of a switch": (
        "{method: switch, lr: 1e-3, expert: lorra}",
        r"adapters\.x\.expert = 'lorra': must be flora, ia3 or lora. Did you mean 'lora'\?",
    ),
    "balance of a plain adapter": (
        "{method: lora, lr: 1e-3, balance_loss: 0.1}",
        r"adapters\.x\.balance_loss = 0\.1: has no meaning for method lora; it belongs to mixlora and "
        r"switch: remove it",
    ),
    "balance of a gate": (
        "{method: meteora, lr: 1e-3, over: [one, two], balance_loss: 0.1}",
        r"adapters\.x\.balance_loss = 0\.1: has no meaning for method meteora; it belongs to mixlora and "
        r"switch: remove it",
    ),
}


@pytest.mark.parametrize(("adapter", "line"), SETTINGS.values(), ids=SETTINGS)
def test_wrong_settings(complain: Complain, adapter: str, line: str) -> None:
    (found,) = complain("recipe=bad.yaml", f"adapters.x={adapter}")
    assert re.fullmatch(line, found), found


def test_a_gate_over_adapters_of_different_bases(complain: Complain, model: Path, tmp_path: Path) -> None:
    """One by the name of its base, one by the hash of its base's weights."""
    bank = AdapterBank.attach(LlamaForCausalLM.from_pretrained(model), [spec("lora", "a", rank=2)])
    own = base_identity(ModelConfig(path=str(model)))  # which leaves its cache beside the weights
    other = {"weights": "0" * 64, "config": "0" * 64}
    bases = {
        "right": BaseModel("model", identity=own),
        "named": BaseModel("org/other"),
        "recorded": BaseModel("model", identity=other),
    }
    for name, base in bases.items():
        export_peft(bank, "a-lora", tmp_path / name, base=base)
    named, recorded = complain(
        "recipe=bad.yaml", "adapters.x={method: meteora, lr: 1e-3, over: [right, named, recorded]}"
    )
    assert re.fullmatch(
        r"adapters\.x\.over = 'named': was trained on the base model org/other, and model\.path is model: "
        r"all members of a gate have the run's base model .*correct base_model_name_or_path .*",
        named,
    )
    assert re.fullmatch(
        r"adapters\.x\.over = 'recorded': was trained on other weights \(SHA-256 000000000000\) than those "
        r"of model \([0-9a-f]{12}\): all members of a gate have the run's base model",
        recorded,
    )


def test_a_base_whose_feed_forward_blocks_are_not_recognised(complain: Complain, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = tiny_model("opt").config  # type: ignore[union-attr]
    config.vocab_size = len(tokenizer)
    type(tiny_model("opt"))(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    (found,) = complain(
        "recipe=bad.yaml", "model.path=opt", "adapters.x={method: mixlora, lr: 1e-3, experts: 2, rank: 2}"
    )
    assert re.fullmatch(
        r"adapters\.x\.method = 'mixlora': .*OPTForCausalLM.*; use another method or base model.*", found
    ), found
