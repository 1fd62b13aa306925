"""Heads on every encoder and on decoders: attached, trained mixed and isolated, and equal in plain PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.heads import rows_of_heads
from flora_train.adapters.spec import AdapterSpec, HeadShape, head_shape
from flora_train.config.model_schema import ModelConfig
from flora_train.data.labels.spec import LabelSpec
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.models.loading import load_base_model
from tests.architectures import ENCODERS, architecture_config
from tests.conftest import perturb, spec
from tests.unit.adapters.helpers import tokens
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    plans_of,
    train_together,
)

LABELS: Mapping[str, LabelSpec] = {
    "three": LabelSpec("single", ("x", "y", "z")),
    "many": LabelSpec("multi", ("p", "q", "r", "s", "t")),
    "number": LabelSpec("regression"),
    "tags": LabelSpec("tokens", ("O", "B", "I", "E")),
}
DECODERS = ("llama", "gpt2", "qwen3", "gpt_neox")
SAME_LOGITS = 1e-5
LENGTHS = (11, 7, 4)


def label_specs(**options: Any) -> list[AdapterSpec]:
    specs = [
        spec("flora", "three", rank=3, variant="residual", **options),
        spec("flora", "number", "pure", rank=2, variant="pure", **options),
        spec("lora", "many", rank=2, **options),
        spec("ia3", "tags", **options),
        spec("lora", "tags", rank=2, **options),
        spec("head", "three", **options),
        spec("head", "tags", **options),
    ]
    return [replace(own, head=head_shape(LABELS[own.task])) for own in specs]


def save_base(architecture: str, folder: Path) -> Path:
    """A tiny model as it is published: an encoder with the head that it was pretrained with."""
    torch.manual_seed(0)
    config = architecture_config(architecture)
    config.pad_token_id = 0
    auto_class = AutoModelForMaskedLM if architecture in ENCODERS else AutoModelForCausalLM
    model: Any = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def inputs_of(rows: int = 3) -> dict[str, Tensor]:
    """Right-padded rows of different lengths."""
    ids, mask = tokens(rows), torch.ones(rows, 11, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def outputs(bank: AdapterBank, inputs: Mapping[str, Tensor], name: str) -> Tensor:
    """What the head of an adapter makes of these rows."""
    states: list[Tensor] = []
    body: nn.Module = bank.model.base_model  # type: ignore[assignment]
    handle = body.register_forward_hook(lambda module, args, output: states.append(output[0]))
    with bank.routed([name] * len(LENGTHS)):
        bank.model(**inputs)
        assert bank.router.routing is not None
        ((_, head, parameters),) = rows_of_heads(bank.router.routing)
        logits = head(states[0], torch.tensor(LENGTHS), parameters)
    handle.remove()
    return logits


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.quick("bert", "distilbert", "deberta-v2", "modernbert")
def test_heads_of_all_kinds_train_mixed_and_each_as_if_alone(architecture: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokens_per_step": 150, "tokens_per_microbatch": 100, "optimizer": "adamw"}
    options = {"architecture": architecture, "labels": LABELS, **settings}
    together = make_trainer(label_specs(lr=2e-3), tmp_path, **options)
    plans = plans_of(together, 12)
    train_together(together, plans)
    assert min(moved(together, architecture).values()) > 1e-3
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("architecture", [*ENCODERS, *DECODERS])
@pytest.mark.quick("bert", "distilbert", "deberta-v2", "modernbert", "llama")
def test_exported_heads_give_the_same_logits_in_plain_peft(architecture: str, tmp_path: Path) -> None:
    base, inputs = save_base(architecture, tmp_path / "base"), inputs_of()
    model = load_base_model(ModelConfig(path=str(base), dtype="float32"), torch.device("cpu")).eval()
    bank = AdapterBank.attach(model, label_specs())
    perturb(bank, 0.1)
    classes = {"text": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification"}
    heads = {}
    for own in bank.specs:
        assert own.head is not None
        heads[own.name] = [classes[own.head.kind], own.head.outputs]
        folder = export_peft(bank, own.name, tmp_path / "adapters" / own.name, base=BaseModel(str(base)))
        assert not (folder / "NOT_FOR_PLAIN_PEFT.txt").exists()
    (tmp_path / "heads.json").write_text(json.dumps(heads))
    (tmp_path / "class").write_text("AutoModel")
    save_file(inputs, tmp_path / "inputs.safetensors")
    program = [sys.executable, str(Path(__file__).parent / "export" / "load_with_peft.py"), str(tmp_path)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "logits.safetensors")
    for own in bank.specs:
        ours, expected = outputs(bank, inputs, own.name), theirs[own.name]
        is_token = inputs["attention_mask"].bool()
        if own.head == HeadShape("tokens", 4):
            ours, expected = ours[is_token], expected[is_token]
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= SAME_LOGITS, own.name
        assert ours.std() > 1e-3
