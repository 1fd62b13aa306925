"""The state of routed adapters: guard, paging, checkpoints, averages, early stopping, sweeps, added tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.load import validate
from flora_train.training.optimizer import AVERAGE
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer, snapshot
from tests.unit.training.test_add_tasks import extend, finish
from tests.unit.training.test_checkpoint import assert_equal, result, stop_before
from tests.unit.training.test_paging import same

BAD_STEP, STEPS = 3, 6
VICTIM = "a-mix"


def specs(**options: Any) -> list[AdapterSpec]:
    """Routed adapters of three pools, two of them in one, and a plain adapter."""
    settings = {"lr": 5e-3, "balance_loss": 0.5, "target_modules": "all-linear", **options}
    mix = {"experts": 3, "rank": 2, "dropout": 0.2, "jitter": 0.1, **settings}
    plain = {key: value for key, value in settings.items() if key != "balance_loss"}
    return [
        spec("mixlora", "a", "mix", **mix),
        spec("mixlora", "b", "mix", **mix),
        spec("mixlora", "c", "fmix", expert="flora", experts=2, top_k=1, rank=2, **settings),
        spec("mixlora", "b", "imix", expert="ia3", experts=3, top_k=3, top_p=0.5, **settings),
        spec("lora", "a", "lora", rank=2, **plain),
    ]


def trainer_in(folder: Path, own: list[AdapterSpec] | None = None, **options: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "steps": STEPS,
        "save_every": 2,
        "log_every": 2,
        "tokens_per_step": 150,
        "optimizer": "adamw",
        "examples_per_draw": 2,
        "interval": 3,
        **options,
    }
    return make_trainer(own or specs(), folder, **settings)


@pytest.mark.parametrize("policy", ["skip", "rollback", "quarantine"])
@pytest.mark.parametrize("victim", [VICTIM, "b-imix"])
@pytest.mark.quick("a-mix-rollback", "b-imix-quarantine")
def test_others_keep_their_bits_when_a_router_is_not_finite(
    victim: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens go to other experts, so that the numbers of tokens of its experts change."""
    found = {}
    for name in ("well", "ill"):
        trainer = trainer_in(tmp_path / name, guard={"policy": policy}, tokens_per_step=400)
        step, adapter = trainer.step, trainer.bank.ids[victim]

        def harmed(
            number: int, plan: Any, name: str = name, trainer: Trainer = trainer, step: Any = step
        ) -> None:
            if name == "ill" and number == BAD_STEP:
                trainer.bank.parameters_of(victim)["model.layers.0.mlp"]["router"][0, 0] = nan
            step(number, plan)

        monkeypatch.setattr(trainer, "step", harmed)
        trainer.train()
        found[name] = {n: trainer.bank.row(i).clone() for n, i in trainer.bank.ids.items()}
    for name, row in found["well"].items():
        if name != victim:
            assert torch.equal(found["ill"][name], row), name
    assert torch.isfinite(found["ill"][victim]).all()
    if policy == "rollback":
        assert trainer.guard.rolled_back == {adapter: 1}
    assert set(trainer.guard.quarantined) == ({adapter} if policy == "quarantine" else set())


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_paged_adapters_end_with_the_same_bits(disk: bool, tmp_path: Path) -> None:
    found = []
    next_task = {"a": "b", "b": "c", "c": "a"}
    own = specs()
    own += [replace(s, task=next_task[s.task], name=f"{next_task[s.task]}2-{s.family}") for s in own]
    for name, slots in (("resident", None), ("paged", 6)):
        folder = tmp_path / name
        paging = None if slots is None else Paging(slots, folder if disk else None)
        folder.mkdir()
        trainer = trainer_in(folder, own, paging=paging, tokens_per_step=140)
        trainer.train()
        found.append(result(trainer))
    assert trainer.bank.pager is not None
    assert trainer.bank.pager.traffic.to_host > 0
    same(found[1], found[0])


@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_run_ends_with_the_same_bits(stop: int, tmp_path: Path) -> None:
    """Between two records, of which the balance losses are means."""
    whole = trainer_in(tmp_path / "whole", log_every=3)
    whole.train()
    stop_before(trainer_in(tmp_path / "parts", log_every=3), stop)
    again = trainer_in(tmp_path / "parts", log_every=3)
    if stop > 2:
        again.resume()
    again.train()
    assert_equal(result(again), result(whole))


def test_averages_and_early_stopping(tmp_path: Path) -> None:
    own = [
        spec("mixlora", "a", "mix", experts=3, lr=5e-3, ema_decay=0.8),
        spec("mixlora", "b", "far", experts=3, lr=3.0, patience=1),
        spec("mixlora", "c", "mix", experts=3, lr=5e-3),
    ]
    trainer = trainer_in(tmp_path, own, interval=1, steps=5)
    trainer.best_adapters.select_best = False
    trainer.train()
    averaged, plain = trainer.bank.ids["a-mix"], trainer.bank.ids["c-mix"]
    assert torch.equal(trainer.bank.row(averaged), trainer.bank.state(averaged)[AVERAGE])
    assert torch.isfinite(trainer.bank.row(plain)).all()
    assert trainer.early_stopping.record()["b-far"]["why"] == "patience"
    assert trainer.optimizer.steps[trainer.bank.ids["b-far"]] < 5


def test_tasks_join_a_finished_run(tmp_path: Path) -> None:
    before = trainer_of_tasks(tmp_path, "ab")
    finish(before)
    kept = snapshot(before)
    after = trainer_of_tasks(tmp_path, "abc")
    extend(after)
    after.train()
    now = snapshot(after)
    for name, state in kept.items():
        assert torch.equal(now[name][0], state[0]), name
    assert after.optimizer.steps[after.bank.ids["c-fmix"]] == STEPS


def trainer_of_tasks(folder: Path, tasks: str) -> Trainer:
    """A run of the adapters of these tasks alone."""
    trainer = trainer_in(folder, [own for own in specs() if own.task in tasks])
    trainer.tasks = {name: task for name, task in trainer.tasks.items() if name in tasks}
    remaining = {name: task for name, task in trainer.config.tasks.items() if name in tasks}
    trainer.config = trainer.config.model_copy(update={"tasks": remaining})
    trainer.joined = dict.fromkeys(trainer.tasks, 0)
    trainer.replan()
    return trainer


def test_lists_of_experts_are_a_sweep() -> None:
    config = validate(
        {
            "name": "run",
            "model": {"path": "unused"},
            "tasks": {"a": {"train": "unused.jsonl"}},
            "adapters": {
                "mix": {
                    "method": "mixlora",
                    "lr": 1e-3,
                    "experts": [4, 8],
                    "top_k": [1, 2],
                    "balance_loss": [0.0, 0.1],
                }
            },
            "training": {"steps": 8, "tokens_per_step": 90, "max_length": 16},
        }
    )
    found = {
        (s.experts.count, s.experts.top_k, s.experts.balance_loss)
        for s in expand(config)
        if s.experts is not None
    }
    assert found == {(e, k, b) for e in (4, 8) for k in (1, 2) for b in (0.0, 0.1)}
    assert {s.sweep for s in expand(config)} == {"mix"}


@pytest.mark.parametrize("checkpointing", ["off", "reentrant"])
def test_records_have_the_balance_loss_beside_the_loss(checkpointing: str, tmp_path: Path) -> None:
    """With even routers it is its coefficient; the loss does not depend on the coefficient in the first
    step."""
    losses = []
    for coefficient in (0.5, 2.0):
        own = specs(balance_loss=coefficient)
        folder = tmp_path / str(coefficient)
        settings = {"checkpointing": checkpointing, "tokens_per_microbatch": 64, "steps": 1, "log_every": 1}
        trainer = trainer_in(folder, own, tokens_per_step=400, interval=None, **settings)
        for pool in trainer.bank.pools:
            for member in range(len(pool.specs)):
                for params in pool.row(member).values():
                    if "router" in params:
                        params["router"].zero_()
        trainer.train()
        (record,) = trainer.folder.read_metrics("step")
        for s in own:
            metrics = record["adapters"][s.name]
            assert ("balance_loss" in metrics) == (s.method == "mixlora")
            if s.method == "mixlora":
                assert metrics["balance_loss"] == pytest.approx(coefficient, rel=1e-5)
        losses.append({name: metrics["loss"] for name, metrics in record["adapters"].items()})
        (evaluation,) = trainer.folder.read_metrics("evaluation")
        assert "balance_loss" not in json.dumps(evaluation)
    assert losses[0] == losses[1]
