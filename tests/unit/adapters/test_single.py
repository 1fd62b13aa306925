"""Rows of one adapter without gradients take a shorter way, which computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import mixed_specs, perturb, spec

ROUTED = [
    spec("mixlora", "a", "mix", experts=4),
    spec("mixlora", "b", "one", experts=3, top_k=1),
    spec("mixlora", "c", "some", experts=4, target_modules=["down_proj", "q_proj"]),
]
SPECS = [*mixed_specs(), *ROUTED]


def tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 1), (3, 7)])
def test_one_adapter_computes_what_it_computes_with_gradients(
    architecture: str, rows: int, length: int
) -> None:
    specs = [s for s in SPECS if architecture == "llama" or s.target_modules == "default"]
    if architecture == "gpt2":
        specs = [replace(s, rank_pattern=(), alpha_pattern=()) for s in specs]
    model: Any = tiny_model(architecture, torch.float32).eval()
    bank = AdapterBank.attach(model, specs)
    perturb(bank)
    ids = tokens(rows, length)
    for adapter in specs:
        bank.route([adapter.name] * rows)
        expected = model(ids).logits.detach()
        bank.abandon()
        with torch.no_grad(), bank.routed([adapter.name] * rows):
            assert torch.allclose(model(ids).logits, expected, atol=2e-5), adapter.name


def test_the_way_is_that_of_the_present_values_and_of_the_adapter_in_the_slot() -> None:
    """Adapters of one pool differ in scale; a page may hold one after the other."""
    specs = [spec("lora", "a", f"lora{i}", rank=2, alpha=float(4 + 8 * i)) for i in range(3)]
    model: Any = tiny_model("llama", torch.float32).eval()
    paged = AdapterBank.attach(model, specs, paging=Paging(device_slots=1))
    plain_model: Any = tiny_model("llama", torch.float32).eval()
    plain = AdapterBank.attach(plain_model, specs)
    ids = tokens(1, 4)
    with torch.no_grad():
        for step in range(2):
            for adapter in range(3):
                noise = torch.randn(plain.row(adapter).shape, generator=torch.Generator().manual_seed(step))
                plain.row(adapter).add_(noise, alpha=0.1)
                paged.row(adapter).add_(noise, alpha=0.1)
            for adapter in (0, 1, 2, 0):
                name = specs[adapter].name
                with plain.routed([name]):
                    expected = plain_model(ids).logits
                with paged.routed([name]):
                    assert torch.allclose(model(ids).logits, expected, atol=1e-6)
