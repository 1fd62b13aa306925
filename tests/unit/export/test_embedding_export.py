"""Adapters that learnt embeddings, of every architecture of encoders, on AutoModel in plain PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from flora_train.adapters.bank import AdapterBank
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.architectures import ENCODERS, VOCABULARY, tiny_model
from tests.conftest import perturb, spec


@pytest.mark.parametrize("architecture", [*ENCODERS, "llama", "gpt2", "opt"])
def test_plain_peft_loads_it_onto_the_body_with_equal_states(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny_model(architecture).eval()
    model.save_pretrained(tmp_path / "base")
    specs = [
        replace(made, pooling="mean")
        for made in (
            spec("lora", "b", rank=2),
            spec("flora", "b", rank=2, variant="residual"),
            spec("flora", "b", "pure", rank=2, variant="pure"),
        )
    ]
    bank = AdapterBank.attach(model, specs)
    perturb(bank, 0.1)
    tokens = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    states = []
    for name in bank.ids:
        with torch.no_grad(), bank.routed([name, name]):
            own = model.base_model(**inputs)[0]
        folder = export_peft(bank, name, tmp_path / name, base=BaseModel(str(tmp_path / "base")))
        assert sorted(file.name for file in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        plain = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), str(folder)).eval()
        with torch.no_grad():
            theirs = plain(**inputs)[0]
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-5)
        states.append(own)
    with torch.no_grad():
        base = model.base_model(**inputs)[0]
    assert all(float((own - base).abs().max()) > 1e-4 for own in states)
