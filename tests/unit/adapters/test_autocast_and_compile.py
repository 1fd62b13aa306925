"""A whole adapted model under torch.autocast and torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, perturb
from tests.unit.adapters.helpers import tokens


def fresh_bank(architecture: str = "llama") -> AdapterBank:
    bank = AdapterBank.attach(
        tiny_model(architecture), mixed_specs() if architecture == "llama" else mixed_specs()[:4]
    )
    perturb(bank)
    return bank


def step(bank: AdapterBank, ids: Sequence[int], model: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Logits, and every pool's gradients."""
    bank.route(ids)
    logits = (bank.model if model is None else model)(input_ids=tokens(len(ids))).logits
    logits.float().square().mean().backward()
    gradients = [pool.gradients.clone() for pool in bank.pools]
    for pool in bank.pools:
        pool.gradients.zero_()
    return logits.detach(), gradients


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # without and with bias
def test_under_autocast_the_masters_get_float32_gradients_near_the_exact_ones(architecture: str) -> None:
    bank = fresh_bank(architecture)
    ids = [*range(len(bank.specs)), -1]
    exact, exact_gradients = step(bank, ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast, gradients = step(bank, ids)
    assert cast.dtype == torch.bfloat16
    assert not torch.equal(cast.float(), exact)
    torch.testing.assert_close(cast.float(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.1 * theirs.norm()


def test_a_compiled_model_follows_every_new_routing() -> None:
    bank = fresh_bank()
    compiled = torch.compile(bank.model, backend="aot_eager")
    every = [*range(len(bank.specs)), -1]
    for ids in (every, every[::-1], [0, 0, 3, 3, -1, 5, 1], [2] * 7, every):
        expected, expected_gradients = step(bank, ids)
        ours, gradients = step(bank, ids, compiled)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradients, expected_gradients)
