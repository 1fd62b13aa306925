"""Heads in everything that keeps adapters: pages, checkpoints, best states, guard, decay and clipping."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.training.best_adapters import load_best
from flora_train.training.trainer import Trainer
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.training.harness import make_trainer, plans_of, snapshot, train_together
from tests.unit.training.test_label_isolation import LABELS, label_specs


def label_trainer(folder: Path, **options: Any) -> Trainer:
    specs = options.pop("specs", None) or label_specs(lr=1e-2)
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"tokens_per_step": 100, "tokens_per_microbatch": 64, "optimizer": "adamw"}
    return make_trainer(specs, folder, "bert", labels=LABELS, **{**settings, **options})


def test_head_of_an_adapter_starts_alike_whatever_its_neighbours(tmp_path: Path) -> None:
    """Initial values depend on the seed and the name, and are distributed as transformers' are."""
    together = label_trainer(tmp_path)
    for name, adapter in together.bank.ids.items():
        alone = label_trainer(tmp_path, specs=[replace(together.bank.specs[adapter], head=None)])
        assert alone.bank.digest(0) == together.bank.digest(adapter), name
        head = together.bank.head_of(name)
        assert head["classifier.bias"].abs().max() == 0
        assert 0.01 < head["classifier.weight"].std() < 0.03
    other = label_trainer(tmp_path, specs=[spec("head", "three", "other", lr=1e-2)])
    head = together.bank.head_of("three-head")["classifier.weight"]
    assert not torch.equal(other.bank.head_of("three-other")["classifier.weight"], head)


@pytest.mark.parametrize("folder", [None, "pages"])
def test_paged_heads_train_to_the_same_bytes(tmp_path: Path, folder: str | None) -> None:
    few: dict[str, Any] = {"tokens_per_step": 45, "steps": 12}
    whole = label_trainer(tmp_path / "whole", **few)
    pages = None
    if folder is not None:
        pages = tmp_path / folder
        pages.mkdir()
    paged = label_trainer(tmp_path / "paged", paging=Paging(3, pages), **few)
    assert paged.bank.pager is not None
    for trainer in (whole, paged):
        trainer.train()
    assert paged.bank.pager.traffic.to_host > 0
    for adapter in range(len(whole.bank.specs)):
        assert paged.bank.digest(adapter) == whole.bank.digest(adapter)


def test_interrupted_heads_resume_to_the_same_bytes(tmp_path: Path) -> None:
    options = {"save_every": 4, "steps": 12}
    straight = label_trainer(tmp_path / "straight", **options)
    straight.train()
    first = label_trainer(tmp_path / "resumed", **options)
    for _ in range(8):
        first.next_plan = first.plan(first.state.step)
        first.train_step()
    first.save()
    first.finish_saving()
    second = label_trainer(tmp_path / "resumed", **options)
    second.resume()
    assert second.state.step == 8
    second.train()
    for adapter, own in enumerate(straight.bank.specs):
        assert second.bank.digest(adapter) == straight.bank.digest(adapter), own.name


def test_best_state_holds_the_head(tmp_path: Path) -> None:
    trainer = label_trainer(tmp_path, interval=4, steps=8)
    trainer.train()
    digests = [trainer.bank.digest(adapter) for adapter in range(len(trainer.bank.specs))]
    for pool in trainer.bank.pools:
        pool.values.zero_()
    best = load_best(trainer.bank, range(len(digests)), trainer.folder.best_adapters)
    assert [trainer.bank.digest(adapter) for adapter in range(len(digests))] == digests
    heldout = trainer.heldout(None, lambda share: None)
    for task, result in heldout.items():
        assert -1 not in result.nats
        for adapter in result.nats:
            assert result.objective_loss(adapter) == pytest.approx(best[adapter].loss, rel=1e-5), task


def test_nan_in_one_head_leaves_the_others_bit_identical(tmp_path: Path) -> None:
    healthy, poisoned = (label_trainer(tmp_path / name) for name in ("healthy", "poisoned"))
    poisoned.bank.head_of("three-flora")["classifier.weight"][0, 0] = float("nan")
    plans = plans_of(healthy, 8)
    for trainer in (healthy, poisoned):
        train_together(trainer, plans)
    before = snapshot(label_trainer(tmp_path / "start"))
    after, expected = snapshot(poisoned), snapshot(healthy)
    for name, state in expected.items():
        if name == "three-flora":
            assert int(after[name][-1]) == 0, "the guard lets no step of it through"
            assert torch.equal(
                after[name][0].nan_to_num(), torch.where(after[name][0].isnan(), 0.0, before[name][0])
            )
            continue
        for own, other in zip(after[name], state, strict=True):
            assert torch.equal(own, other), name


def test_head_has_a_rate_a_decay_and_a_clip_of_its_adapter(tmp_path: Path) -> None:
    """One SGD step is computed by hand from the gradient."""
    options: dict[str, Any] = {"weight_decay": 0.5, "max_grad_norm": 1e-3}
    specs = [
        spec("lora", "three", rank=2, lr=0.1, head_lr=0.4, lr_ratio=2.0, **options),
        spec("head", "tags", lr=0.2, **options),
    ]
    trainer = label_trainer(tmp_path, specs=specs, optimizer="sgd")
    plan = plans_of(trainer, 1)[0]
    rates = {0: 0.4, 1: 0.2}
    start = [trainer.bank.row(adapter).clone() for adapter in range(2)]
    trainer._accumulate_gradients(0, plan)
    gradients = [trainer.bank.gradient_row(adapter).clone() for adapter in range(2)]
    for pool in trainer.bank.pools:
        pool.gradients.zero_()
    trainer.step(0, plan)
    assert plan.label_tokens.keys() == {0, 1}
    for adapter, rate in rates.items():
        pool, _ = trainer.bank.location[adapter]
        head = slice(pool.head_start, None)
        clipped = gradients[adapter] * (1e-3 / (gradients[adapter].norm() + 1e-6))
        expected = start[adapter][head] * (1 - rate * 0.5) - rate * clipped[head]
        assert torch.allclose(trainer.bank.row(adapter)[head], expected, atol=1e-7)


def test_dropout_of_the_base_and_its_heads_is_off() -> None:
    bank = AdapterBank.attach(tiny_model("bert"), [spec("head", "three")])
    assert all(module.p == 0 for module in bank.model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("checkpointing", ["reentrant", "non_reentrant"])
def test_recomputed_activations_train_the_same(tmp_path: Path, checkpointing: str) -> None:
    plain = label_trainer(tmp_path / "plain")
    recomputing = label_trainer(tmp_path / "recomputing", checkpointing=checkpointing)
    for trainer in (plain, recomputing):
        train_together(trainer, plans_of(trainer, 4))
    for adapter, own in enumerate(plain.bank.specs):
        assert torch.equal(plain.bank.row(adapter), recomputing.bank.row(adapter)), own.name
