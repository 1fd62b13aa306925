"""Routed adapters trained among others equal themselves trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import mixed_specs, spec
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    plans_of,
    train_together,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"tokens_per_microbatch": 48},
    "reentrant": {"checkpointing": "reentrant"},
    "non_reentrant": {"checkpointing": "non_reentrant", "tokens_per_microbatch": 48},
}


LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.35}


def mixlora_specs(lr: float) -> list[Any]:
    """Routed adapters of each kind of expert, with dropout, jitter and top_p, beside plain adapters.

    Where two experts are as probable up to rounding, rounding chooses between them: routed adapters learn
    more slowly here, so that it does not grow.
    """
    options = {"lr": lr / 2}
    return [
        spec("mixlora", "a", "mix", experts=4, balance_loss=0.5, dropout=0.2, jitter=0.1, **options),
        spec("mixlora", "b", "mix", experts=4, balance_loss=0.5, dropout=0.2, jitter=0.1, **options),
        spec("mixlora", "c", "fmix", expert="flora", experts=3, top_k=1, balance_loss=0.5, **options),
        spec("mixlora", "a", "imix", expert="ia3", experts=3, top_k=3, top_p=0.5, **options),
        *mixed_specs(lr=lr)[:4],
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.quick("reentrant-sgd", "accumulation-adamw")
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    specs = mixlora_specs(lr=LEARNING_RATES[optimizer])
    options = {"optimizer": optimizer, "examples_per_draw": 2, "tokens_per_step": 180, **options}
    together = make_trainer(specs, tmp_path, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    assert any(max(plan.draws.values(), default=0) > 1 for plan in plans)
    train_together(together, plans)
    assert min(moved(together).values()) > 1e-3
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences
