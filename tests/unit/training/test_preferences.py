"""Preferences among other rows: trained together equals trained alone, and losses equal their formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import padded_tokens
from flora_train.data.preferences.preference import Preference
from tests.conftest import mixed_specs
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
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
    together = make_trainer(specs, tmp_path, preferences=MIXED, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    assert any({row.task for row in rows} > {"b", "c"} for plan in plans for rows in plan.microbatches)
    train_together(together, plans)
    differences = largest_difference_to_training_alone(
        together, plans, tmp_path, preferences=MIXED, **options
    )
    assert max(differences.values()) <= 1e-5, differences
    assert min(moved(together).values()) > 3e-4


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
