"""One adapter fails in every possible way: the others stay bitwise the same, and the policy is applied."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.training import trainer as trainer_module
from flora_train.training.loss import RowOutputs
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer

STEPS, BAD_STEP = 14, 9
VICTIM = "b-flora_one"
POLICIES = ("skip", "rollback", "quarantine")


class Harm:
    """Hurts one adapter at one step: its losses (by a factor), its gradient or its weights."""

    def __init__(self, kind: str, factor: float, at: int = BAD_STEP) -> None:
        self.kind, self.factor, self.at = kind, factor, at

    def on(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Trainer:
        victim = trainer.bank.ids[VICTIM]
        step, losses, exchange = trainer.step, trainer.row_losses, trainer_module.sum_gradients
        now = {"step": -1}

        def at_step(number: int, plan: Any) -> bool:
            now["step"] = number
            if self.kind == "weight" and number == self.at:
                trainer.bank.row(victim)[3] = self.factor
            return step(number, plan)

        class Losses:
            model = losses.model

            def __call__(harmed, batch: Any) -> torch.Tensor:
                found = losses(batch)
                wrong = (batch.adapter_ids == victim) & (self.kind == "loss") & (now["step"] == self.at)
                if trainer.model.training and wrong.any():
                    found = found.index_copy(0, wrong.nonzero()[:, 0], found[wrong] * self.factor)
                return found

            def outputs(harmed, batch: Any) -> RowOutputs:
                return RowOutputs(harmed(batch))

        def summed(bank: AdapterBank, adapters: Any) -> int:
            sent = exchange(bank, adapters)
            if self.kind == "gradient" and now["step"] == self.at and bank is trainer.bank:
                bank.gradient_row(victim)[5] = self.factor
            return sent

        trainer.step = at_step  # type: ignore[method-assign]
        trainer.row_losses = Losses()  # type: ignore[assignment]
        monkeypatch.setattr(trainer_module, "sum_gradients", summed)
        return trainer


def trainer_in(folder: Path, guard: dict[str, Any]) -> Trainer:
    folder.mkdir(exist_ok=True)
    # a large budget: every adapter is in every step
    specs = mixed_specs(lr=2e-3)
    return make_trainer(
        specs, folder, interval=7, guard=guard, steps=STEPS, save_every=4, tokens_per_step=600
    )


def trained(
    folder: Path, guard: dict[str, Any], monkeypatch: pytest.MonkeyPatch, harm: Harm | None = None
) -> Trainer:
    trainer = trainer_in(folder, guard)
    with monkeypatch.context() as patch:
        (harm.on(trainer, patch) if harm else trainer).train()
    return trainer


def rows(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: trainer.bank.row(i).clone() for name, i in trainer.bank.ids.items()}


HARMS = [
    pytest.param("loss", nan, id="NaN loss"),
    pytest.param("loss", inf, id="infinite loss"),
    pytest.param("loss", 100.0, id="loss spike"),
    pytest.param("gradient", nan, id="NaN gradient"),
    pytest.param("gradient", -inf, id="infinite gradient"),
    pytest.param("weight", nan, id="NaN weight"),
    pytest.param("weight", inf, id="infinite weight"),
]


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The run that nothing happens to: the same under every policy."""
    trainer = trainer_in(tmp_path_factory.mktemp("well"), {"spike_factor": 5.0, "window": 4})
    trainer.train()
    return trainer


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "factor"), HARMS)
@pytest.mark.quick(
    "NaN loss-skip",
    "infinite loss-rollback",
    "loss spike-quarantine",
    "infinite gradient-quarantine",
    "NaN weight-rollback",
)
def test_the_others_are_the_same_to_the_last_bit(
    kind: str, factor: float, policy: str, well: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = {"policy": policy, "spike_factor": 5.0, "window": 4}
    ill = trained(tmp_path / "ill", guard, monkeypatch, Harm(kind, factor))
    victim = ill.bank.ids[VICTIM]
    before, after = rows(well), rows(ill)
    for name in before.keys() - {VICTIM}:
        assert torch.equal(before[name], after[name]), name
    assert well.metrics.skipped.total() == 0
    assert torch.isfinite(after[VICTIM]).all()
    assert ill.guard.quarantined.keys() == ({victim} if policy == "quarantine" else set())
    if policy == "quarantine":
        assert ill.guard.quarantined[victim][0] == BAD_STEP + 1
        assert ill.optimizer.steps[victim] == 8  # of the checkpoint that it went back to
    if policy == "rollback":
        assert ill.guard.rolled_back == {victim: 1}
        assert (
            ill.optimizer.steps[victim] == well.optimizer.steps[victim] - 2
        )  # the bad step and the one since the checkpoint
    if policy == "skip":
        lost = STEPS - BAD_STEP if kind == "weight" else 1  # nobody mends a weight
        assert (ill.metrics.skipped[victim], ill.optimizer.steps[victim]) == (lost, STEPS - lost)


def test_rollback_restores_the_last_checkpoint_step_with_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_in(tmp_path / "one", {"policy": "quarantine"})
    victim = trainer.bank.ids[VICTIM]
    states: list[list[torch.Tensor]] = []
    save = trainer.save

    def seen() -> None:
        states.append([part.clone() for part in trainer.bank.state(victim).values()])
        save()

    monkeypatch.setattr(trainer, "save", seen)
    with monkeypatch.context() as patch:
        Harm("loss", nan).on(trainer, patch).train()
    found = load_state(trainer, victim)
    assert all(
        torch.equal(a, b) for a, b in zip(found, states[1], strict=True)
    )  # of step 8, not of 4, 12 or 14
    assert not torch.equal(states[0][0], states[1][0])


def load_state(trainer: Trainer, adapter: int) -> list[torch.Tensor]:
    """Of the last checkpoint: selection has put the best state into the bank meanwhile."""
    tensors = {name: torch.empty_like(tensor) for name, tensor in trainer.bank.tensors().items()}
    trainer.checkpoints.restore(tensors)
    pool, slot = trainer.bank.location[adapter]
    number = trainer.bank.pools.index(pool)
    return [tensors[f"pool{number}.{part}"][slot] for part in ("values", "first", "second")]


def test_adapter_is_quarantined_after_its_rollbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path / "one", {"policy": "rollback", "rollbacks": 2})
    victim = trainer.bank.ids[VICTIM]
    with monkeypatch.context() as patch:
        for at in (5, 6, 10):
            Harm("loss", nan, at).on(trainer, patch)
        trainer.train()
    assert trainer.guard.rolled_back == {victim: 2}
    assert trainer.guard.quarantined == {victim: (11, "its loss is not finite")}
    record = trainer.folder.read_metrics("step")[-1]
    assert record["quarantined"] == {VICTIM: {"step": 11, "why": "its loss is not finite"}}
    assert record["adapters"][VICTIM]["rollbacks"] == 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.quick("rollback")
def test_a_run_with_a_bad_step_that_is_taken_up_again_ends_the_same(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = {"policy": policy, "spike_factor": 5.0, "window": 4}
    whole = trained(tmp_path / "whole", guard, monkeypatch, Harm("loss", 100.0))
    for pause in (BAD_STEP, 13):  # the checkpoints before are of steps 8 and 12
        folder = tmp_path / f"pause {pause}"
        with monkeypatch.context() as patch:
            first = Harm("loss", 100.0).on(trainer_in(folder, guard), patch)
            step = first.step

            def killed(number: int, plan: Any, step: Any = step, pause: int = pause) -> None:
                if number == pause:
                    raise KeyboardInterrupt
                step(number, plan)

            first.step = killed  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                first.train()
        with monkeypatch.context() as patch:
            again = Harm("loss", 100.0).on(trainer_in(folder, guard), patch)
            again.resume()
            again.train()
        assert again.guard.state_dict() == whole.guard.state_dict()
        assert all(torch.equal(a, b) for a, b in zip(rows(again).values(), rows(whole).values(), strict=True))


def test_a_spike_is_measured_by_the_adapters_own_losses(tmp_path: Path) -> None:
    guard = trainer_in(tmp_path / "one", {"spike_factor": 3.0, "window": 4}).guard
    for losses in ({0: 1.0, 1: 10.0}, {0: 2.0, 1: 10.0}, {0: 100.0, 1: 10.0}):
        assert guard.find_anomalies(losses) == {}  # of one that is new nothing is known
    assert guard.find_anomalies({0: 3.0, 1: 10.0}) == {}
    assert guard.find_anomalies({0: 7.4, 1: 29.0}) == {}  # the median of 1, 2, 100 and 3 is 2.5
    assert guard.find_anomalies({0: 15.7, 1: 30.1}) == {
        0: "its loss spiked to 15.7",
        1: "its loss spiked to 30.1",
    }
    assert guard.find_anomalies({0: 15.6, 1: 30.0}) == {}  # a spike is not remembered


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        ({"window": 8}, r"guard\.window = 8: requires guard\.spike_factor"),
        ({"rollbacks": 2}, r"guard\.rollbacks = 2: requires policy=rollback"),
        ({"spike_factor": 1.0}, r"guard\.spike_factor = 1\.0: must be more than 1"),
        ({"policy": "ignore"}, r"guard\.policy = 'ignore': must be quarantine, rollback or skip"),
    ],
)
def test_invalid_guard_is_refused(guard: dict[str, Any], words: str) -> None:
    raw = {
        "name": "test",
        "model": {"path": "unused"},
        "tasks": {"a": {"train": "unused.jsonl"}},
        "adapters": {"x": {"method": "lora", "lr": 1e-3}},
        "training": {"steps": 5},
        "guard": guard,
    }
    with pytest.raises(UserError, match=words):
        validate(raw)
