"""Banks with routed adapters that are away from the identity, for the tests of their exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.helpers import tokens


def routed_specs(**options: Any) -> list[AdapterSpec]:
    """A routed adapter for each method of experts, beside a plain adapter. Only feed-forward layers have
    adapters in `blocks`."""
    return [
        spec("mixlora", "a", "mix", experts=3, rank=2, alpha=3.0, rslora=True, **options),
        spec("mixlora", "a", "fmix", expert="flora", experts=2, top_k=1, **options),
        spec("mixlora", "a", "imix", expert="ia3", experts=4, top_k=3, top_p=0.6, **options),
        spec("lora", "a", "lora", rank=2, **options),
    ]


def routed_bank(architecture: str = "llama", specs: list[AdapterSpec] | None = None) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model(architecture).eval(), specs or routed_specs())
    perturb(bank)
    return bank


@torch.no_grad()
def logits_of(bank: AdapterBank, name: str) -> Tensor:
    batch = tokens(3)
    with bank.routed([name] * len(batch)):
        return bank.model(input_ids=batch).logits


def save_base(architecture: str, folder: Path) -> Path:
    tiny_model(architecture).save_pretrained(folder)  # type: ignore[operator]
    return folder
