"""Gates over adapters, trained among others: isolation, frozen members, the guard, checkpoints and paging."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.export.gate_members import members_of
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs, spec
from tests.unit.adapters.gate_reference import FLORAS, LORAS, MIXED, gate_spec
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    plans_of,
    snapshot,
    train_together,
)
from tests.unit.training.routed_specs import CHECKPOINTING
from tests.unit.training.test_checkpoint import assert_equal, result, stop_before

IDS = {"a": tuple(MIXED), "b": tuple(reversed(LORAS))}
"""Members of the tasks with task_id: in an order other than the gates' own."""
FROZEN = ("a-floras", "b-loras", "c-loras")


def gate_specs(**options: Any) -> list[Any]:
    """Gates over each kind of members, frozen and trained, with and without task_id, beside plain ones."""
    return [
        gate_spec(MIXED, "a", "mixed", train_members=True, gate_loss=0.5, **options),
        gate_spec(LORAS, "b", "loras", gate_loss=2.0, weight_decay=0.1, **options),
        gate_spec(LORAS, "c", "loras", gate_loss=0.0, weight_decay=0.1, **options),
        gate_spec(FLORAS, "a", "floras", gate_loss=0.0, top_k=1, **options),
        *mixed_specs(**options)[:4],
    ]


def gate_trainer(folder: Path, specs: list[Any] | None = None, **options: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    return make_trainer(specs or gate_specs(lr=1e-2), folder, members=IDS, **options)


def frozen_members(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    views = members_of(bank, bank.ids[name])
    return {
        f"{member}.{module}.{param}": view.clone()
        for member, modules in views.items()
        for module, params in modules.items()
        for param, view in params.items()
    }


def gates_of(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    parameters = bank.parameters_of(name)
    return {module: params["gate"].clone() for module, params in parameters.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.quick("reentrant-adamw", "non_reentrant-sgd")
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    """Frozen members keep their bits, and all gates move."""
    specs = gate_specs(lr={"adamw": 2e-3, "sgd": 0.2}[optimizer])
    options = {"optimizer": optimizer, "tokens_per_step": 150, "members": IDS, **options}
    together = make_trainer(specs, tmp_path, **options)
    frozen = {name: frozen_members(together.bank, name) for name in FROZEN}
    gates = {name: gates_of(together.bank, name) for name in (*FROZEN, "a-mixed")}
    trained = frozen_members(together.bank, "a-mixed")
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    train_together(together, plans)
    for name, before in frozen.items():
        after = frozen_members(together.bank, name)
        assert all(torch.equal(after[key], value) for key, value in before.items()), name
    for name, before in gates.items():
        after = gates_of(together.bank, name)
        moves = [float((after[key] - value).abs().max()) for key, value in before.items()]
        assert min(moves) > 0, name
        assert max(moves) > 1e-4, name
    after = frozen_members(together.bank, "a-mixed")
    assert all(not torch.equal(after[key], value) for key, value in trained.items())
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


def test_padding_of_ranks_stays_zero_when_members_are_trained(tmp_path: Path) -> None:
    gate = gate_spec(LORAS, "b", train_members=True, weight_decay=0.1, lr=1e-2)
    trainer = make_trainer([gate], tmp_path, optimizer="adamw", members=IDS)
    train_together(trainer, plans_of(trainer, 4))
    row = trainer.bank.row(0).clone()
    for params in trainer.bank.parameters_of(gate.name).values():
        params["gate"].zero_()
    for modules in members_of(trainer.bank, 0).values():
        for views in modules.values():
            for view in views.values():
                view.zero_()
    assert float(row.abs().max()) > 0
    assert not trainer.bank.row(0).any()


def test_frozen_members_do_not_count_in_the_norm_that_is_clipped(tmp_path: Path) -> None:
    trainer = make_trainer([gate_spec(LORAS, "b", lr=1e-2)], tmp_path, members=IDS)
    (plan,) = plans_of(trainer, 1)
    trainer._accumulate_gradients(0, plan)
    pool, _ = trainer.bank.location[0]
    is_frozen = pool.rate_columns(torch.device("cpu")) == 1
    assert int(is_frozen.sum()) == sum(view.numel() for view in frozen_views(trainer.bank))
    assert not pool.gradients[0][is_frozen].any()
    assert pool.gradients[0][~is_frozen].abs().max() > 0


def frozen_views(bank: AdapterBank) -> list[Tensor]:
    """All parameters of the only gate, padding included, but the gate."""
    params = list(bank.parameters_of(bank.specs[0].name).values())
    return [view for of_module in params for name, view in of_module.items() if name != "gate"]


def test_the_loss_of_the_gate_makes_it_choose_the_member_of_the_row(tmp_path: Path) -> None:
    """Rows of member m repeat the token 10 + m: a gate can tell them apart, and does after some steps."""
    gate = gate_spec(LORAS, "b", lr=0.3, gate_loss=5.0)
    trainer = make_trainer([gate], tmp_path, optimizer="adamw", members=IDS)
    split = trainer.tasks["b"].train
    for document, member in enumerate(split.targets):
        split.tokens[split.offsets[document] : split.offsets[document + 1]] = 10 + int(member)
    plans = plans_of(trainer)
    losses = []
    for part in (plans[:1], plans[1:-1], plans[-1:]):
        train_together(trainer, part)
        losses.append(trainer.metrics.flush()[gate.name]["gate_loss"])
    assert losses[0] > 2 * losses[2] > 0
    for number, name in enumerate(IDS["b"]):
        recorder = Recorder()
        trainer.bank.router.recorder = recorder
        with trainer.bank.routed([gate.name]), torch.no_grad():
            trainer.model(input_ids=torch.full((1, 6), 10 + number))
        first = torch.cat(recorder.first)
        assert float((first == list(LORAS).index(name)).float().mean()) > 0.8, name


class Recorder:
    """The first choices of all layers."""

    def __init__(self) -> None:
        self.first: list[Tensor] = []

    def add(self, spec: Any, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
        self.first.append(experts[:, 0])


@pytest.mark.parametrize("policy", ["skip", "rollback", "quarantine"])
@pytest.mark.quick("skip")
def test_a_gate_that_is_not_finite_leaves_the_others_bit_identical(tmp_path: Path, policy: str) -> None:
    found = []
    for kind in ("whole", "harmed"):
        trainer = gate_trainer(tmp_path / kind, guard={"policy": policy}, tokens_per_step=400)
        plans = plans_of(trainer, 6)
        for number, plan in enumerate(plans):
            if kind == "harmed" and number == 2:
                gates = trainer.bank.parameters_of("b-loras")
                next(iter(gates.values()))["gate"][0, 0] = nan
            trainer.step(number, plan)
        found.append(snapshot(trainer))
    for name, states in found[0].items():
        if name != "b-loras":
            assert all(torch.equal(a, b) for a, b in zip(states, found[1][name], strict=True)), name


def test_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 6, "save_every": 2, "optimizer": "adamw", "interval": 3}
    whole = gate_trainer(tmp_path / "whole", **settings)
    whole.train()
    first = gate_trainer(tmp_path / "parts", **settings)
    stop_before(first, 3)
    last = gate_trainer(tmp_path / "parts", **settings)
    last.resume()
    assert last.state.step == 2
    last.train()
    assert_equal(result(last), result(whole))


def test_paged_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Six gates share a pool, of which four fit on the device."""
    found = []
    specs = [gate_spec(LORAS, task, family, gate_loss=0.0) for task in "abc" for family in ("one", "two")]
    specs += [spec("lora", task) for task in "abc"]
    for name, paging in (("resident", None), ("paged", Paging(4))):
        settings: dict[str, Any] = {"steps": 6, "tokens_per_step": 42, "optimizer": "adamw"}
        trainer = gate_trainer(tmp_path / name, specs, paging=paging, **settings)
        trainer.train()
        found.append(result(trainer))
    assert len(trainer.bank.pools) == 2
    assert trainer.bank.pager is not None
    assert trainer.bank.pager.traffic.to_host > 0
    assert_equal(found[1], found[0])
