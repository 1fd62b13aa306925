"""The loop that the benchmarks compare with, expert by expert, equals the bank."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from benchmarks.expert_loop import ExpertLoop, LoopAdapter
from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import RowDraw
from tests.architectures import tiny_model
from tests.conftest import spec

ROWS = ((0, 0, 2), (1, 2, 4))
"""(adapter, first row, end row)."""


@pytest.fixture
def bank() -> AdapterBank:
    """Two adapters of five experts, away from the identity."""
    specs = [
        spec("mixlora", name, "mix", experts=5, top_k=2, balance_loss=20.0, rank=3) for name in ("a", "b")
    ]
    bank = AdapterBank.attach(tiny_model("llama"), specs)
    generator = torch.Generator().manual_seed(1)
    for adapter in range(len(specs)):
        row = bank.row(adapter)
        row += 0.2 * torch.randn(row.shape, generator=generator)
    return bank


@pytest.mark.parametrize("shared_inputs", [False, True])
def test_the_loop_has_the_outputs_and_gradients_of_the_bank(bank: AdapterBank, shared_inputs: bool) -> None:
    ids = torch.randint(2, 60, (4, 7), generator=torch.Generator().manual_seed(2))
    weights = torch.randn(4, 7, 1, generator=torch.Generator().manual_seed(3))
    plain = tiny_model("llama").requires_grad_(False)
    loop = ExpertLoop(
        deepcopy(plain), [LoopAdapter.of_bank(bank, name) for name in bank.ids], shared_inputs=shared_inputs
    )
    bank.route([0, 0, 1, 1], draws=[RowDraw(0, 1.0)] * 4)
    of_bank = bank.model(ids).logits
    (of_bank * weights).sum().backward()
    loop.rows.begin(ROWS)
    of_loop = loop.model(ids).logits
    balance = loop.balance_loss(0) + loop.balance_loss(1)
    ((of_loop * weights).sum() + balance).backward()
    assert float((of_bank.detach() - plain(ids).logits).abs().max()) > 0.1
    torch.testing.assert_close(of_loop, of_bank, atol=1e-5, rtol=1e-5)
    for adapter, name in enumerate(bank.ids):
        bank.row(adapter).copy_(bank.gradient_row(adapter))  # so that gradients have names
        for module, layer in bank.parameters_of(name).items():
            for key, gradient in layer.items():
                mine = loop.adapters[adapter].parameters[module][key].grad
                assert mine is not None, f"{module}.{key}"
                assert float(gradient.abs().max()) > 0, f"{module}.{key}"
                torch.testing.assert_close(mine, gradient, atol=2e-4, rtol=1e-4)


def test_the_balance_loss_reaches_the_routers_of_the_loop(bank: AdapterBank) -> None:
    ids = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(2))
    loop = ExpertLoop(tiny_model("llama"), [LoopAdapter.of_bank(bank, "a-mix")], shared_inputs=False)
    loop.rows.begin([(0, 0, 2)])
    loop.model(ids)
    loop.balance_loss(0).backward()
    gradients = [layer["router"].grad for layer in loop.adapters[0].parameters.values() if "router" in layer]
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)
