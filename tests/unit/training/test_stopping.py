"""Early stopping of each adapter by its own held-out loss, without any effect on the others."""

from __future__ import annotations

from math import nan
from pathlib import Path

import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.training.early_stopping import Patience
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer


def observed(losses: list[float], patience: int | None, min_delta: float = 0.0) -> int | None:
    """The evaluation at which one adapter stops."""
    stopping = Patience([spec("lora", "a", patience=patience, min_delta=min_delta or None)])
    return next((step for step, loss in enumerate(losses, start=1) if stopping.observe({0: loss})), None)


@pytest.mark.parametrize(
    ("losses", "patience", "min_delta", "at"),
    [
        ([3, 2, 1, 0.5], 1, 0.0, None),
        ([3, 3], 1, 0.0, 2),
        ([3, 4, 2, 3, 2, 2], 2, 0.0, 5),  # an improvement begins the count anew; equal is no better
        ([3, 2.95, 2.9, 2.85], 2, 0.1, 3),  # each a little better than the last, none than the best by enough
        ([3, 2.95, 2.88, 2.85, 2.8], 2, 0.1, 5),
        ([nan, nan], 2, 0.0, 2),
        ([3, nan, 2, nan, nan], 2, 0.0, 5),
        ([3, 4, 5, 6], None, 0.0, None),
    ],
)
def test_patience_is_a_number_of_evaluations_without_improvement(
    losses: list[float], patience: int | None, min_delta: float, at: int | None
) -> None:
    assert observed(losses, patience, min_delta) == at


def test_a_stopping_that_is_taken_up_again_decides_as_the_whole_one() -> None:
    specs = [spec("lora", "a", patience=2), spec("lora", "b", patience=3)]
    losses = [{0: a, 1: b} for a, b in zip([3, 2, 2.5, 2.6, 1], [3, 3, 3, 2, 2], strict=True)]
    whole = Patience(specs)
    assert [whole.observe(found) for found in losses] == [[], [], [], [0], []]
    for pause in range(len(losses)):
        parts, again = Patience(specs), Patience(specs)
        for found in losses[:pause]:
            parts.observe(found)
        again.load_state_dict(parts.state_dict())
        for found in losses[pause:]:
            again.observe(found)
        assert again.state_dict() == whole.state_dict()


def trainer(folder: Path, **training: int) -> Trainer:
    """lora on task a learns far too fast to get better for long; the others are patient for ever."""
    specs = [
        spec("lora", "a", lr=3.0, max_grad_norm=None, patience=1),
        spec("flora", "a", lr=1e-3),
        spec("ia3", "b", lr=1e-3),
    ]
    return make_trainer(specs, folder, interval=2, **{"steps": 12, **training})


def test_stopped_adapter_stays_unchanged_and_the_others_train_on(tmp_path: Path) -> None:
    one = trainer(tmp_path / "one")
    one.train()
    assert one.early_stopping.record() == {
        "a-lora": {"step": (step := one.early_stopping.retired[0].step), "why": "patience"}
    }
    assert step < 10
    plans = [one.plan(number) for number in range(12)]
    assert all(
        (0 in plan.label_tokens) <= (number < step) for number, plan in enumerate(plans) if plan is not None
    )
    assert sum(0 in plan.label_tokens for plan in plans if plan is not None) == one.optimizer.steps[0] > 0
    assert one.optimizer.steps[2] > one.optimizer.steps[0]
    records = one.folder.read_metrics("evaluation")
    assert records[-1]["left"] == one.early_stopping.record()
    assert [("a-lora" in record["adapters"]) for record in records] == [
        record["step"] <= step for record in records
    ]


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.quick("3")
def test_a_run_with_stops_that_is_taken_up_again_ends_the_same(tmp_path: Path, save_every: int) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    for pause in (3, 5, 7):  # before and after the stop
        folder = tmp_path / f"pause {pause}"
        first = trainer(folder, save_every=save_every)
        step = first.step

        def killed(
            number: int, plan: object, first: Trainer = first, step: object = step, pause: int = pause
        ) -> None:
            if number == pause:
                raise KeyboardInterrupt
            step(number, plan)  # type: ignore[operator]

        first.step = killed  # type: ignore[assignment, method-assign]
        with pytest.raises(KeyboardInterrupt):
            first.train()
        again = trainer(folder, save_every=save_every)
        again.resume()
        again.train()
        assert again.early_stopping.state_dict() == whole.early_stopping.state_dict()
        assert all(torch.equal(again.bank.row(i), whole.bank.row(i)) for i in range(3))


def test_a_run_ends_when_all_have_stopped(tmp_path: Path) -> None:
    specs = [spec("lora", task, lr=3.0, max_grad_norm=None, patience=1) for task in "ab"]
    one = make_trainer(specs, tmp_path, interval=1, steps=200)
    one.train()
    assert one.early_stopping.retired.keys() == {0, 1}
    assert one.state.step == max(one.early_stopping.first_absent_steps.values()) < 200


@pytest.mark.parametrize(
    ("adapter", "evaluation", "words"),
    [
        ({"patience": 2}, {}, r"evaluation\.interval: is required by adapters\.x\.patience"),
        ({"min_delta": 0.1}, {"interval": 5}, r"adapters\.x\.min_delta = 0\.1: requires patience"),
        ({"patience": 0}, {"interval": 5}, r"adapters\.x\.patience = 0"),
    ],
)
def test_invalid_patience_is_refused(
    adapter: dict[str, float], evaluation: dict[str, int], words: str
) -> None:
    raw = {
        "name": "test",
        "model": {"path": "unused"},
        "tasks": {"a": {"train": "unused.jsonl"}},
        "adapters": {"x": {"method": "lora", "lr": 1e-3, **adapter}},
        "training": {"steps": 5},
        "evaluation": evaluation,
    }
    with pytest.raises(UserError, match=words):
        validate(raw)
