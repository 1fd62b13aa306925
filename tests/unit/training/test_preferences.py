"""Preferences among other rows: trained together equals trained alone, and losses equal their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Row, padded_tokens
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.training.objectives import StepTotals
from flora_train.training.step_plan import StepPlan
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs, perturb
from tests.unit.training import preference_reference as formulas
from tests.unit.training.harness import (
    check_isolation,
    make_trainer,
    plans_of,
    train_together,
)

MIXED = {
    "b": Preference("dpo", 0.5, label_smoothing=0.1, sft_weight=0.3),
    "c": Preference("kto", 0.5, desirable_weight=1.5),
}
BUDGET: dict[str, Any] = {"examples_per_draw": 3, "tokens_per_step": 450, "tokens_per_microbatch": 192}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tokens_per_microbatch": 4096}, id="one-microbatch"),
        pytest.param({"checkpointing": "reentrant"}, id="reentrant-checkpointing"),
    ],
)
def test_preferences_trained_together_equal_those_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    """Text, DPO and KTO rows share steps and micro-batches, and adapters are absent in some steps."""
    lr = {"adamw": 2e-3, "sgd": 0.2}[optimizer]
    specs = [replace(s, dropout=0.2) if s.name == "b-lora_some" else s for s in mixed_specs(lr=lr)]
    options = {**BUDGET, "optimizer": optimizer, **options}
    plans = check_isolation(specs, tmp_path, least_move=3e-4, preferences=MIXED, **options)
    mixed = [{row.task for row in rows} for plan in plans for rows in plan.microbatches]
    assert any(len(tasks) > 1 and tasks & {"b", "c"} for tasks in mixed)


def test_coupled_rows_are_never_divided_and_microbatches_hold_their_budget(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, preferences=MIXED, **BUDGET)
    units: dict[tuple[int, str, int | None, int], set[int]] = {}
    for number, plan in enumerate(plans_of(trainer)):
        assert plan.tokens <= BUDGET["tokens_per_step"]
        for place, rows in enumerate(plan.microbatches):
            assert padded_tokens(rows) <= BUDGET["tokens_per_microbatch"]
            references = {(row.task, row.unit) for row in rows if row.adapter == BASE_ID}
            for row in rows:
                if row.unit is not None and row.adapter != BASE_ID:
                    units.setdefault((number, row.task, row.unit, row.adapter), set()).add(place)
                    assert (row.task, row.unit) in references
    assert units
    assert all(len(places) == 1 for places in units.values())


@pytest.mark.parametrize(
    "preference",
    [
        Preference("dpo", 0.3),
        Preference("dpo", 0.7, label_smoothing=0.2, sft_weight=0.5),
        Preference("ipo", 0.4),
        Preference("orpo", 0.5, sft_weight=1.0),
        Preference("kto", 0.6, desirable_weight=2.0, undesirable_weight=0.5),
    ],
    ids=lambda preference: f"{preference.objective}-{preference.label_smoothing:g}",
)
def test_losses_and_gradients_equal_independent_formulas(tmp_path: Path, preference: Preference) -> None:
    """Of a step in float64 on a perturbed adapter: the derivative of every log-probability, written by hand,
    times the gradient of that log-probability, computed one completion at a time."""
    specs = [s for s in mixed_specs() if s.name in ("b-flora_one", "a-lora")]
    options: dict[str, Any] = {**BUDGET, "tokens_per_microbatch": 500, "dtype": torch.float64}
    trainer = make_trainer(specs, tmp_path, preferences={"b": preference}, **options)
    perturb(trainer.bank, 0.05)
    adapter = trainer.bank.ids["b-flora_one"]
    plan = next(plan for plan in plans_of(trainer) if adapter in plan.label_tokens)
    sums = trainer._accumulate_gradients(0, plan)
    gradient = trainer.bank.gradient_row(adapter).clone()
    trainer.bank.gradient_row(adapter).zero_()
    loss = StepTotals(plan, sums.flatten().tolist(), trainer.task_of).losses[adapter]
    expected, derivatives = expected_loss(trainer, plan, adapter, preference)
    assert loss == pytest.approx(expected, rel=1e-6)
    for row, derivative in derivatives.items():
        trainer.bank.route([adapter])
        (-derivative * trainer.row_losses(trainer.make_batch([row])).sum()).backward()
    difference = (trainer.bank.gradient_row(adapter) - gradient).norm() / gradient.norm()
    assert difference <= 1e-5


def logps_of(trainer: Trainer, rows: list[Row], adapter: int) -> np.ndarray:
    """log p of each row alone, under an adapter or the base."""
    logps = []
    for row in rows:
        with torch.no_grad(), trainer.bank.routed([adapter]):
            logps.append(-float(trainer.row_losses(trainer.make_batch([row]))))
    return np.array(logps)


def expected_loss(
    trainer: Trainer, plan: StepPlan, adapter: int, preference: Preference
) -> tuple[float, dict[Row, float]]:
    """The loss of an adapter's step, and its derivative by the log-probability of every row."""
    rows = [row for group in plan.microbatches for row in group if row.adapter == adapter]
    split = trainer.tasks["b"].train
    assert isinstance(split, PreferenceSplit)
    learnt = [row for row in rows if not row.frozen]
    if preference.objective == "kto":
        losses, derivatives = [], {}
        for unit in {row.unit for row in learnt}:
            own = [row for row in learnt if row.unit == unit]
            other = [row for row in rows if row.unit == unit and row.frozen]
            kl = formulas.kl_of_draw(logps_of(trainer, other, adapter), logps_of(trainer, other, BASE_ID))
            parts = formulas.kto(
                logps_of(trainer, own, adapter),
                logps_of(trainer, own, BASE_ID),
                np.array([split.labels[row.example] for row in own]),
                kl=kl,
                beta=preference.beta,
                desirable_weight=preference.desirable_weight,
                undesirable_weight=preference.undesirable_weight,
            )
            losses += list(parts.losses)
            derivatives |= dict(zip(own, parts.d_logp / len(learnt), strict=True))
        return float(np.mean(losses)), derivatives
    chosen = sorted((row for row in learnt if row.document == 0), key=lambda row: row.unit or 0)
    rejected = sorted((row for row in learnt if row.document == 1), key=lambda row: row.unit or 0)
    logps = [logps_of(trainer, part, adapter) for part in (chosen, rejected)]
    reference = [logps_of(trainer, part, BASE_ID) for part in (chosen, rejected)]
    sizes = {
        "chosen_tokens": np.array([split.learnt(row.example) for row in chosen]),
        "rejected_tokens": np.array([split.learnt(row.example, 1) for row in rejected]),
    }
    if preference.objective == "dpo":
        smoothing = preference.label_smoothing
        pairs = formulas.dpo(*logps, *reference, beta=preference.beta, label_smoothing=smoothing)
    elif preference.objective == "ipo":
        pairs = formulas.ipo(*logps, *reference, **sizes, beta=preference.beta)
    else:
        pairs = formulas.odds_ratio(*logps, **sizes, beta=preference.beta)
    nll, d_nll = formulas.sft(logps[0], sizes["chosen_tokens"])
    d_chosen = pairs.d_chosen / len(chosen) + preference.sft_weight * d_nll
    derivatives = dict(zip(chosen, d_chosen, strict=True))
    derivatives |= dict(zip(rejected, pairs.d_rejected / len(chosen), strict=True))
    return float(pairs.losses.mean()) + preference.sft_weight * nll, derivatives


def test_a_nan_in_one_adapter_leaves_the_others_bit_identical(tmp_path: Path) -> None:
    """Also where they share the micro-batches and the reference rows of its pairs."""
    options = {**BUDGET, "tokens_per_microbatch": 4096, "tokens_per_step": 900}
    good, bad = (make_trainer(mixed_specs(), tmp_path, preferences=MIXED, **options) for _ in range(2))
    plans = plans_of(good, 6)
    victim = bad.bank.ids["b-flora_one"]
    bad.bank.row(victim)[0] = float("nan")
    for trainer in (good, bad):
        train_together(trainer, plans)
    for name, adapter in good.bank.ids.items():
        if adapter != victim:
            assert torch.equal(good.bank.row(adapter), bad.bank.row(adapter)), name
