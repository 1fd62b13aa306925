"""Averages of weights: their values in float64, and where they take the place of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.adapters.pool import build_pools, numbers_of
from flora_train.adapters.spec import AdapterSpec
from flora_train.commands.plan_text import _pool_line
from flora_train.config.training_schema import TrainingConfig
from flora_train.training.best_adapters import load_adapter
from flora_train.training.optimizer import AVERAGE, BankOptimizer, TorchBankOptimizer
from flora_train.training.trainer import Trainer
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, spec
from tests.unit.training.harness import make_trainer
from tests.unit.training.test_checkpoint import assert_equal, result, stop_before
from tests.unit.training.test_optimizer import draw_gradients

DECAYS = {"a-flora": 0.9, "c-pure": 0.5, "a-lora": 0.99, "c-dora": 0.8, "a-ia3": 0.7}


def averaged_specs(decays: dict[str, float] = DECAYS) -> list[AdapterSpec]:
    """Five adapters with averages, one of them in a pool with one that has none."""
    specs = [replace(s, ema_decay=decays.get(s.name)) for s in mixed_specs(lr=5e-3)]
    return [*specs, replace(specs[3], name="b-lora", task="b", ema_decay=None)]


def trainer_in(folder: Path, specs: list[AdapterSpec] | None = None, **options: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"steps": 12, "save_every": 3, "log_every": 2, "optimizer": "adamw", **options}
    return make_trainer(specs or averaged_specs(), folder, interval=4, **settings)


def test_average_is_that_of_the_weights_after_each_own_step() -> None:
    bank = AdapterBank.attach(tiny_model(), averaged_specs())
    stepper = BankOptimizer(bank, TrainingConfig(steps=100))
    visited: dict[int, list[np.ndarray]] = {i: [] for i in range(len(bank.specs))}
    for step in range(9):
        draw_gradients(bank, step)
        if step == 4:
            bank.gradient_row(3)[0] = float("nan")
        for adapter, update in stepper.step([i for i in visited if (i + step) % 4]).items():
            if not update.skipped:
                visited[adapter].append(bank.row(adapter).double().numpy().copy())
        for pool in bank.pools:
            pool.gradients.zero_()
    assert {len(rows) for rows in visited.values()} == {6, 7}
    for adapter, rows in visited.items():
        decay = bank.specs[adapter].ema_decay
        if decay is None:
            continue
        weights = np.array([decay ** (len(rows) - 1 - i) for i in range(len(rows))])
        expected = (weights[:, None] * np.array(rows)).sum(axis=0) / weights.sum()
        average = bank.state(adapter)[AVERAGE].double().numpy()
        assert np.abs(average - expected).max() <= 1e-6 * np.abs(expected).max()
        assert np.abs(average - rows[-1]).max() > 1e-3


def test_only_pools_with_averages_store_them() -> None:
    bank = AdapterBank.attach(tiny_model(), averaged_specs())
    BankOptimizer(bank, TrainingConfig(steps=100))
    with_averages = {pool.specs[0].name for pool in bank.pools if AVERAGE in pool.planes}
    assert with_averages == {"a-flora", "a-lora", "c-dora", "a-ia3"}
    stored = sum(rows.numel() for pool in bank.pools for rows in (*pool.planes.values(), pool.gradients))
    assert stored == numbers_of(bank.pools)
    assert sum(tensor.numel() for tensor in bank.tensors().values()) == numbers_of(bank.pools, False)


def test_averages_are_evaluated_and_selected_and_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    averaging = trainer_in(tmp_path / "averaging")
    plain = trainer_in(tmp_path / "plain", averaged_specs({}))
    last: dict[str, dict[int, torch.Tensor]] = {}
    for name, trainer in (("averaging", averaging), ("plain", plain)):
        trainer.best_adapters.select_best = False
        restore = trainer.best_adapters.restore

        def before_restoring(name: str = name, trainer: Trainer = trainer, restore: Any = restore) -> None:
            last[name] = {i: trainer.bank.row(i).clone() for i in range(len(trainer.bank.specs))}
            restore()

        trainer.best_adapters.restore = before_restoring  # type: ignore[method-assign]
        trainer.train()
    assert all(torch.equal(last["averaging"][i], row) for i, row in last["plain"].items())
    for i, s in enumerate(averaging.bank.specs):
        expected = last["averaging"][i]
        if s.ema_decay is not None:
            expected = averaging.bank.state(i)[AVERAGE]
            assert not torch.equal(expected, last["averaging"][i])
        assert torch.equal(averaging.bank.row(i), expected), s.name
    evaluations = averaging.folder.read_metrics("evaluation")
    held_out = averaging.heldout(None, lambda share: None)  # of the selected parameters
    for i, s in enumerate(averaging.bank.specs):
        recorded = evaluations[-1]["adapters"][s.name]["loss"]
        assert held_out[s.task].loss(i) == pytest.approx(recorded, rel=1e-6)
    others = plain.folder.read_metrics("evaluation")[-1]["adapters"]
    assert evaluations[-1]["adapters"]["a-flora"] != others["a-flora"]
    assert evaluations[-1]["adapters"]["b-lora"] == others["b-lora"]


def test_before_its_first_step_an_adapter_is_evaluated_as_it_is(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run")
    before = {i: trainer.bank.row(i).clone() for i in range(8)}
    with trainer.optimizer.averaged_weights(range(8)):
        assert all(torch.equal(trainer.bank.row(i), row) for i, row in before.items())


def test_weights_return_after_an_evaluation_that_failed(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run")
    for number in range(3):
        plan = trainer.plan(number)
        assert plan is not None
        trainer.step(number, plan)
    before = {name: tensor.clone() for name, tensor in trainer.bank.tensors().items()}
    with pytest.raises(KeyError), trainer.optimizer.averaged_weights(range(8)):
        raise KeyError
    assert all(torch.equal(trainer.bank.tensors()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [3, 5, 11])
@pytest.mark.quick("5-adamw")
def test_interrupted_run_ends_with_the_same_bits(stop: int, optimizer: str, tmp_path: Path) -> None:
    whole = trainer_in(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    stop_before(trainer_in(tmp_path / "parts", optimizer=optimizer), stop)
    last = trainer_in(tmp_path / "parts", optimizer=optimizer)
    last.resume()
    last.train()
    assert_equal(result(last), result(whole))
    for s in whole.bank.specs:
        file = f"{s.name}.safetensors"
        ours, theirs = (load_file(run.folder.best_adapters / file) for run in (last, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_paging_changes_no_bit(disk: bool, tmp_path: Path) -> None:
    next_task = {"a": "b", "b": "c", "c": "a"}
    specs = [s for s in averaged_specs() if s.name not in ("b-lora", "c-dora")]
    specs += [replace(s, task=next_task[s.task], name=f"{next_task[s.task]}2-{s.family}") for s in specs]
    found = []
    for name, slots in (("resident", None), ("paged", 5)):
        paging = None
        if slots is not None:
            paging = Paging(slots, tmp_path if disk else None)
        trainer = trainer_in(tmp_path / name, specs, tokens_per_step=72, paging=paging)
        trainer.train()
        found.append(result(trainer))
    assert trainer.bank.pager is not None
    assert trainer.bank.pager.traffic.to_host > 0
    assert len([pool for pool in trainer.bank.pools if AVERAGE in pool.host]) == 3
    assert_equal(found[1], found[0])


def test_rollback_restores_the_average_too(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", guard={"policy": "rollback"})
    victim = trainer.bank.ids["a-flora"]
    for number in range(4):
        plan = trainer.plan(number)
        assert plan is not None
        if number == 2:
            trainer.guard.snapshot()
            good = {name: rows.clone() for name, rows in trainer.bank.state(victim).items()}
        trainer.step(number, plan)
    assert not torch.equal(good[AVERAGE], trainer.bank.state(victim)[AVERAGE])
    trainer.bank.gradient_row(victim).fill_(float("nan"))
    updates = trainer.optimizer.step([victim])
    trainer.guard.apply_policy({}, updates, 5)
    assert trainer.guard.rolled_back[victim] == 1
    assert all(torch.equal(rows, good[name]) for name, rows in trainer.bank.state(victim).items())


def test_adapter_that_retires_leaves_its_average(tmp_path: Path) -> None:
    specs = [spec("lora", "a", ema_decay=0.9, patience=1, min_delta=100.0), spec("lora", "b", ema_decay=0.9)]
    trainer = trainer_in(tmp_path / "run", specs)
    trainer.train()
    retired = trainer.early_stopping.retired
    assert [retirement.step for retirement in retired.values()] == [8]
    (adapter,) = retired
    selected = trainer.best_adapters.best[adapter].step
    bank = AdapterBank.attach(tiny_model(), specs)
    load_adapter(bank, adapter, trainer.folder.best_adapters)
    assert torch.equal(bank.row(adapter), trainer.bank.row(adapter))
    if selected == 8:
        assert torch.equal(bank.row(adapter), trainer.bank.state(adapter)[AVERAGE])


@pytest.mark.usefixtures("triton_backend")
def test_averages_follow_the_triton_optimizer() -> None:
    from flora_train.kernels.backend import use_backend
    from tests.triton_device import DEVICE

    banks = []
    for backend in ("torch", "triton"):
        use_backend(backend, DEVICE)  # type: ignore[arg-type]
        bank = AdapterBank.attach(tiny_model().to(DEVICE), averaged_specs())
        stepper = BankOptimizer(bank, TrainingConfig(steps=100))
        for step in range(3):
            draw_gradients(bank, step)
            stepper.step(range(8))
        banks.append(bank)
    for name, tensor in banks[0].tensors().items():
        torch.testing.assert_close(banks[1].tensors()[name], tensor, rtol=2e-6, atol=1e-7)


def test_torch_s_interface_gives_the_averages() -> None:
    bank = AdapterBank.attach(tiny_model(), averaged_specs())
    optimizer = TorchBankOptimizer(bank, TrainingConfig(steps=100))
    for step in range(2):
        draw_gradients(bank, step)
        optimizer.step()
    weights = bank.row(0).clone()
    with optimizer.averaged_weights():
        average = bank.row(0).clone()
    assert torch.equal(bank.row(0), weights)
    assert torch.equal(bank.state(0)[AVERAGE], average)
    assert not torch.equal(average, weights)


def test_plan_counts_the_average() -> None:
    specs = averaged_specs()
    pools, _ = build_pools(tiny_model(), specs)
    lines = {pool.specs[0].name: _pool_line(pool) for pool in pools}
    assert lines["a-flora"].endswith("with gradient, moments and average")
    assert lines["b-flora_one"].endswith("with gradient and moments")
    (largest,) = (pool for pool in pools if pool.specs[0].name == "a-lora")
    assert f"{5 * 4 * largest.row_size / 1e3:.1f} kB" in lines["a-lora"]
