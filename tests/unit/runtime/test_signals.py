"""Signals: the first finishes and saves the step, the second ends the process; handlers are restored."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.runtime.signals import Interrupted, StopSignals
from flora_train.training.step_plan import StepPlan
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer


def test_the_first_is_noted_and_a_later_one_is_what_it_was() -> None:
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        _told_twice()
    finally:
        signal.signal(signal.SIGINT, own)


def _told_twice() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals(same=0.0) as signals:
        assert not signals.stop_requested
        signal.raise_signal(signal.SIGINT)
        assert signals.stop_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signals_shortly_after_one_another_are_one() -> None:
    with StopSignals(same=60.0) as signals:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert signals.stop_requested


def tell_to_end_in_step(trainer: Trainer, number: int) -> None:
    """number: counted from 1."""
    step = trainer.step

    def told(before: int, plan: StepPlan) -> None:
        if before == number - 1:
            signal.raise_signal(signal.SIGTERM)
        step(before, plan)

    trainer.step = told  # type: ignore[method-assign]


def test_step_of_a_signal_is_the_last_and_is_saved(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(lr=2e-3), tmp_path, steps=10, save_every=100)
    tell_to_end_in_step(trainer, 5)
    with pytest.raises(Interrupted, match="saved after step 5") as pause:
        trainer.train()
    assert (pause.value.step, trainer.state.step) == (5, 5)
    assert [file.name for file in trainer.checkpoints.files()] == ["step-00000005.safetensors"]


def test_stop_requested_in_the_last_evaluation_it_is_saved_and_ends_before_the_final_one(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(mixed_specs(lr=2e-3), tmp_path, steps=3, interval=3)
    heldout = trainer.heldout

    def told(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return heldout(*arguments)

    trainer.heldout = told  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="saved after step 3"):
        trainer.train()
    again = make_trainer(mixed_specs(lr=2e-3), tmp_path, steps=3, interval=3)
    again.resume()
    again.heldout = None  # type: ignore[assignment, method-assign]  # nothing is left to evaluate
    again.train()
    assert again.state.step == again.state.evaluated == 3


def test_stop_skips_a_due_evaluation_which_the_resumed_run_does(tmp_path: Path) -> None:
    def run(name: str) -> Trainer:
        return make_trainer(
            mixed_specs(lr=2e-3, patience=1), tmp_path / name, steps=8, interval=2, save_every=100
        )

    whole, paused, again = run("whole"), run("parts"), run("parts")
    whole.train()
    tell_to_end_in_step(paused, 4)
    with pytest.raises(Interrupted, match="saved after step 4"):
        paused.train()
    assert paused.state.evaluated == 2
    again.resume()
    again.train()
    check_alike(again, whole)


def test_a_kill_in_a_long_evaluation_costs_no_step(tmp_path: Path) -> None:
    def run(name: str) -> Trainer:
        return make_trainer(
            mixed_specs(lr=2e-3, patience=1), tmp_path / name, steps=8, interval=4, save_every=4
        )

    whole, killed, again = run("whole"), run("parts"), run("parts")
    whole.train()

    def end(*arguments: object) -> None:
        killed.finish_saving()
        raise KeyboardInterrupt

    killed.heldout = end  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again.resume()
    assert (again.state.step, again.state.evaluated) == (4, 0)
    again.train()
    check_alike(again, whole)


def check_alike(run: Trainer, other: Trainer) -> None:
    """Adapters, and what was measured of them, are the same to the last bit."""
    for name, tensor in run.bank.tensors().items():
        assert torch.equal(tensor, other.bank.tensors()[name]), name
    assert run.folder.read_metrics("evaluation") == other.folder.read_metrics("evaluation")
    assert run.best_adapters.best == other.best_adapters.best
