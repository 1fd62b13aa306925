"""LoRA+: B learns at lr_ratio x lr, as in an independent float64 optimizer and in PEFT's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.config.training_schema import TrainingConfig
from flora_train.kernels.backend import use_backend
from flora_train.training.optimizer import BankOptimizer
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import mixed_specs, spec
from tests.triton_device import DEVICE
from tests.unit.config.test_sweep import config
from tests.unit.training.test_optimizer import draw_gradients

BETAS, EPS = (0.8, 0.95), 1e-6


def own_ratios() -> list[AdapterSpec]:
    """Adapters with ratios in pools of their own, and two in one pool, of which one has none."""
    ratios = {"a-flora": 16.0, "c-pure": 0.25, "a-lora": 4.0, "c-dora": 2.0}
    specs = [
        replace(s, lr_ratio=ratios.get(s.name, 1.0), lr=10.0 ** -(2 + i / 3), weight_decay=0.1 * i)
        for i, s in enumerate(mixed_specs())
    ]
    return [*specs, replace(specs[3], name="b-lora", task="b", lr_ratio=1.0)]


class Reference:
    """AdamW or SGD of one adapter in float64, parameter by parameter."""

    def __init__(self, bank: AdapterBank, adapter: int, optimizer: str) -> None:
        self.spec, self.optimizer = bank.specs[adapter], optimizer
        pool, _ = bank.location[adapter]
        self.parts: list[tuple[slice, float]] = []
        for layout in pool.layout.values():
            for name, (start, shape) in layout.items():
                ratio = self.spec.lr_ratio if name in ("B", "m") else 1.0
                self.parts.append((slice(start, start + prod(shape)), self.spec.lr * ratio))
        self.weights = bank.row(adapter).double().numpy().copy()
        self.first, self.second = np.zeros_like(self.weights), np.zeros_like(self.weights)
        self.count = 0

    def step(self, gradient: np.ndarray) -> None:
        self.count += 1
        norm = np.sqrt((gradient**2).sum())
        if self.spec.max_grad_norm is not None:
            gradient = gradient * min(1.0, self.spec.max_grad_norm / (norm + 1e-6))
        for part, lr in self.parts:
            self.weights[part] *= 1.0 - lr * self.spec.weight_decay
            if self.optimizer == "sgd":
                self.weights[part] -= lr * gradient[part]
                continue
            self.first[part] = BETAS[0] * self.first[part] + (1 - BETAS[0]) * gradient[part]
            self.second[part] = BETAS[1] * self.second[part] + (1 - BETAS[1]) * gradient[part] ** 2
            m = self.first[part] / (1 - BETAS[0] ** self.count)
            v = self.second[part] / (1 - BETAS[1] ** self.count)
            self.weights[part] -= lr * m / (np.sqrt(v) + EPS)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_parameter_moves_as_in_float64(optimizer: str) -> None:
    bank = AdapterBank.attach(tiny_model(), own_ratios())
    stepper = BankOptimizer(bank, TrainingConfig(steps=100, optimizer=optimizer, betas=BETAS, eps=EPS))
    references = [Reference(bank, i, optimizer) for i in range(len(bank.specs))]
    starts = [reference.weights.copy() for reference in references]
    for step in range(6):
        draw_gradients(bank, step)
        present = [i for i in range(len(bank.specs)) if (i + step) % 3]
        for i in present:
            references[i].step(bank.gradient_row(i).double().numpy())
        bank_absent = [bank.row(i).clone() for i in range(len(bank.specs)) if i not in present]
        for pool in bank.pools:  # absent adapters have no gradient
            for member, slot in pool.slot_of.items():
                adapter = bank.location.index((pool, member))
                if adapter not in present:
                    pool.gradients[slot] = 0.0
        stepper.step(present)
        absent = [bank.row(i) for i in range(len(bank.specs)) if i not in present]
        assert all(torch.equal(a, b) for a, b in zip(absent, bank_absent, strict=True))
    for i, reference in enumerate(references):
        moved = np.abs(reference.weights - starts[i]).max()
        assert moved > 5e-5
        error = np.abs(bank.row(i).double().numpy() - reference.weights).max()
        assert error <= 1e-5 * moved + 5e-7 * np.abs(reference.weights).max(), bank.specs[i].name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_adapter_without_a_ratio_keeps_its_bits_beside_one_with(optimizer: str) -> None:
    rows = []
    for ratio in (1.0, 16.0):
        specs = [spec("lora", "a", weight_decay=0.1), spec("lora", "b", lr_ratio=ratio, weight_decay=0.1)]
        bank = AdapterBank.attach(tiny_model(), specs)
        stepper = BankOptimizer(bank, TrainingConfig(steps=10, optimizer=optimizer))
        for step in range(3):
            draw_gradients(bank, step)
            stepper.step([0, 1])
        rows.append(bank.pools[0].values.clone())
    assert torch.equal(rows[0][0], rows[1][0])
    assert not torch.equal(rows[0][1], rows[1][1])


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("present", [range(8), (0, 3, 4, 6), (1, 7)], ids=["all", "some", "without a ratio"])
def test_the_triton_kernel_moves_adapters_as_torch_does(present: Sequence[int]) -> None:
    banks = []
    for name in ("torch", "triton"):
        use_backend(name, DEVICE)  # type: ignore[arg-type]
        bank = AdapterBank.attach(tiny_model().to(DEVICE), own_ratios())
        stepper = BankOptimizer(bank, TrainingConfig(steps=100, betas=BETAS, eps=EPS))
        for step in range(3):
            draw_gradients(bank, step)
            stepper.step(present)
        banks.append(bank)
    for name, tensor in banks[0].tensors().items():
        torch.testing.assert_close(banks[1].tensors()[name], tensor, rtol=2e-6, atol=1e-7)


NAMES = {
    "A": "lora_A.default.weight",
    "B": "lora_B.default.weight",
    "m": "lora_magnitude_vector.default.weight",
}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_equals_peft_s_loraplus_optimizer(method: str) -> None:
    """Forward, backward and ten steps on the same batches, with decay."""
    targets = ["q_proj", "down_proj"]
    ours = spec(method, rank=3, target_modules=targets, lr=1e-3, lr_ratio=16, weight_decay=0.2)
    bank = AdapterBank.attach(tiny_model(), [replace(ours, max_grad_norm=None)])
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=method == "dora")
    theirs: Any = get_peft_model(tiny_model(), config)
    parameters = dict(theirs.named_parameters())
    for module, params in bank.parameters_of(ours.name).items():
        for name, tensor in params.items():
            parameters[f"base_model.model.{module}.{NAMES[name]}"].data.copy_(tensor)
    judge = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.2,
        betas=BETAS, eps=EPS,
    )  # fmt: skip
    stepper = BankOptimizer(bank, TrainingConfig(steps=100, betas=BETAS, eps=EPS))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        tokens = torch.randint(2, VOCABULARY, (2, 9), generator=generator)
        judge.zero_grad()
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        judge.step()
        bank.route([0, 0])
        bank.model(input_ids=tokens, labels=tokens).loss.backward()
        stepper.step([0])
    for module, params in bank.parameters_of(ours.name).items():
        for name, tensor in params.items():
            expected = parameters[f"base_model.model.{module}.{NAMES[name]}"]
            torch.testing.assert_close(tensor, expected.detach(), rtol=1e-4, atol=1e-5)
            assert name == "A" or expected.abs().max() > 0.05  # B has left zero


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "ia3", "lr": 1e-2, "lr_ratio": 4}, r"lr_ratio = 4.*: has no meaning for method ia3"),
        ({"method": "lora", "lr": 1e-2, "lr_ratio": 0}, r"lr_ratio = 0: must be more than 0"),
        (
            {"method": "lora", "lr": 0.1, "lr_ratio": 16, "weight_decay": 0.7},
            r"weight_decay = 0.7: times lr x lr_ratio = 1.6 is more than 1",
        ),
        (
            {"method": "lora", "lr": 0.1, "loraplus_lr_ratio": 16},
            r"loraplus_lr_ratio: unknown key.*adapters\.x\.lr_ratio",
        ),
    ],
)
def test_ratio_that_cannot_be_meant_is_refused(adapter: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**adapter)
