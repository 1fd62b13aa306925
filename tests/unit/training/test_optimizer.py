"""The bank's optimizer equals torch's, adapter by adapter, in few calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.training_schema import TrainingConfig
from flora_train.kernels.backend import use_backend
from flora_train.training.optimizer import BankOptimizer, learning_rate
from tests.architectures import architecture_config, tiny_model
from tests.conftest import mixed_specs, spec
from tests.triton_device import DEVICE
from tests.unit.training.harness import make_trainer, plans_of

ADAMW = {"optimizer": "adamw", "betas": (0.8, 0.95), "eps": 1e-6}


def own_settings() -> list[AdapterSpec]:
    """Seven adapters, no two alike in learning rate, decay, clipping and schedule."""
    clips = [None, 0.5, 1.0, 1e3, 0.01, 2.0, 0.2]
    schedules = ["constant", "linear", "cosine"]
    return [
        replace(
            s,
            lr=10.0 ** -(1 + i / 2),
            weight_decay=0.1 * i,
            max_grad_norm=clips[i],
            lr_schedule=schedules[i % 3],
            warmup_steps=i,
        )
        for i, s in enumerate(mixed_specs())
    ]


def draw_gradients(bank: AdapterBank, seed: int) -> None:
    """Gradients of every size, from step to step and from number to number."""
    generator = torch.Generator().manual_seed(seed)
    for pool in bank.pools:
        noise = torch.randn(pool.gradients.shape, generator=generator)
        pool.gradients.copy_(noise * 10 ** (2 * torch.rand(pool.gradients.shape, generator=generator) - 2))


@pytest.mark.parametrize("training", [ADAMW, {"optimizer": "sgd"}], ids=["adamw", "sgd"])
def test_every_adapter_moves_as_torch_s_optimizer_would_move_it_alone(training: dict[str, Any]) -> None:
    config = TrainingConfig(steps=100, **training)
    bank = AdapterBank.attach(tiny_model(), own_settings())
    optimizer = BankOptimizer(bank, config)
    theirs = [torch.nn.Parameter(bank.row(i).clone()) for i in range(len(bank.specs))]
    starts = [p.detach().clone() for p in theirs]
    judges = [stock_optimizer(p, s, config) for p, s in zip(theirs, bank.specs, strict=True)]
    for step in range(8):
        draw_gradients(bank, step)
        for i, (parameter, judge) in enumerate(zip(theirs, judges, strict=True)):
            ours = bank.specs[i]
            parameter.grad = bank.gradient_row(i).clone()
            if ours.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_([parameter], ours.max_grad_norm)
            judge.param_groups[0]["lr"] = learning_rate(ours, step)
            if config.optimizer == "sgd":  # torch's SGD couples its decay to the gradient; ours is AdamW's
                parameter.data.mul_(1.0 - learning_rate(ours, step) * ours.weight_decay)
            judge.step()
        results = optimizer.step(range(len(bank.specs)))
        assert not any(result.skipped for result in results.values())
    for i, (parameter, start) in enumerate(zip(theirs, starts, strict=True)):
        expected = parameter.detach()
        moved = (expected - start).abs().max()
        assert moved > 1e-5
        # a few roundings of the numbers themselves, and of the way they went
        assert (bank.row(i) - expected).abs().max() <= 5e-7 * expected.abs().max() + 1e-5 * moved, bank.specs[
            i
        ].name


def stock_optimizer(
    parameter: torch.nn.Parameter, ours: AdapterSpec, config: TrainingConfig
) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD([parameter], lr=ours.lr)
    return torch.optim.AdamW(
        [parameter], lr=ours.lr, betas=config.betas, eps=config.eps, weight_decay=ours.weight_decay
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_slots_of_a_pool_move_the_same_whether_all_or_some_are_present(optimizer: str) -> None:
    """All slots present are updated in place, some by index: one adapter's numbers must not depend on it."""
    specs = [spec("lora", task, lr=1e-2, weight_decay=0.1) for task in "abc"]
    rows = []
    for present in ([0, 1, 2], [0, 1]):
        bank = AdapterBank.attach(tiny_model(), specs)
        stepper = BankOptimizer(bank, TrainingConfig(steps=10, optimizer=optimizer))
        for step in range(3):
            draw_gradients(bank, step)
            stepper.step(present)
        rows.append(bank.pools[0].values.clone())
    assert torch.equal(rows[0][:2], rows[1][:2])
    assert not torch.equal(rows[0][2], rows[1][2])


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("present", [range(6), (0, 3, 4)], ids=["all", "some"])
def test_the_triton_kernel_moves_adapters_as_torch_does(present: Sequence[int]) -> None:
    """Three steps, in the second of which one adapter's gradient is not finite: values, moments, step counts
    and gradients."""
    steppers = []
    for name in ("torch", "triton"):
        use_backend(name, DEVICE)
        bank = AdapterBank.attach(tiny_model().to(DEVICE), own_settings())
        stepper = BankOptimizer(bank, TrainingConfig(steps=100, **ADAMW))
        for step in range(3):
            draw_gradients(bank, step)
            if step == 1:
                bank.gradient_row(3)[7] = float("nan")
            stepper.step(present)
        steppers.append(stepper)
    ours, theirs = steppers[1], steppers[0]
    assert ours.steps == theirs.steps
    assert ours.steps[3] == 2
    for name, tensor in theirs.bank.tensors().items():
        torch.testing.assert_close(ours.bank.tensors()[name], tensor, rtol=2e-6, atol=1e-7)
    for adapter in range(6):
        assert bool(ours.bank.gradient_row(adapter).any()) == (adapter not in present)


def test_gradients_of_the_step_are_cleared_and_its_norms_reported() -> None:
    bank = AdapterBank.attach(tiny_model(), mixed_specs())
    draw_gradients(bank, 0)
    norms = [float(bank.gradient_row(i).norm()) for i in range(6)]
    results = BankOptimizer(bank, TrainingConfig(steps=10)).step([0, 4])
    assert {a: r.gradient_norm for a, r in results.items()} == pytest.approx(
        {0: norms[0], 4: norms[4]}, rel=1e-6
    )
    assert [bool(bank.gradient_row(i).any()) for i in range(6)] == [False, True, True, True, False, True]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_gradient_that_is_not_finite_moves_nothing_and_counts_no_step(optimizer: str, poison: float) -> None:
    bank = AdapterBank.attach(tiny_model(), [spec("lora", task, weight_decay=0.1) for task in "abc"])
    stepper = BankOptimizer(bank, TrainingConfig(steps=10, optimizer=optimizer))
    draw_gradients(bank, 0)
    bank.gradient_row(1)[5] = poison
    before = bank.pools[0].values.clone()
    results = stepper.step([0, 1, 2])
    assert [results[i].skipped for i in range(3)] == [False, True, False]
    assert [torch.equal(before[i], bank.row(i)) for i in range(3)] == [False, True, False]
    assert stepper.steps == [1, 0, 1]
    assert not bank.pools[0].gradients.any()
    assert torch.isfinite(bank.pools[0].values).all()


class CountCalls(TorchDispatchMode):
    """How many torch kernels are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def calls_of_a_step(optimizer: str, layers: int, adapters: int, absent: int) -> int:
    config = architecture_config("llama")
    config.num_hidden_layers = layers
    bank = AdapterBank.attach(
        AutoModelForCausalLM.from_config(config), [spec("flora", f"t{i}", rank=2) for i in range(adapters)]
    )
    stepper = BankOptimizer(bank, TrainingConfig(steps=10, optimizer=optimizer))
    draw_gradients(bank, 0)
    with CountCalls() as count:
        results = stepper.step(range(adapters - absent))
    assert len(results) == adapters - absent
    return count.calls


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("absent", [0, 1])
def test_kernel_calls_of_a_step_grow_with_neither_layers_nor_adapters(optimizer: str, absent: int) -> None:
    few = calls_of_a_step(optimizer, layers=1, adapters=3, absent=absent)
    assert 0 < few < 60
    assert calls_of_a_step(optimizer, layers=4, adapters=3, absent=absent) == few
    assert calls_of_a_step(optimizer, layers=1, adapters=16, absent=absent) == few


def test_learning_rate_follows_the_adapter_s_own_steps(tmp_path: Path) -> None:
    """An adapter that sits out steps of the run continues its schedule where it left off."""
    specs = mixed_specs(lr_schedule="linear", warmup_steps=2, steps=12)
    trainer = make_trainer(specs, tmp_path)
    own = [0] * len(specs)
    for number, plan in enumerate(plans_of(trainer, 10)):
        trainer.step(number, plan)
        for adapter in plan.label_tokens:
            assert trainer.metrics.last_steps[adapter].lr == learning_rate(specs[adapter], own[adapter])
            own[adapter] += 1
    assert trainer.optimizer.steps == own
    assert len(set(own)) > 1
