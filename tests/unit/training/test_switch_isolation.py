"""Switch adapters trained among others equal themselves trained alone."""

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
from tests.unit.training.test_routed_isolation import OPTIONS, mixlora_specs


def switch_specs(**options: Any) -> list[Any]:
    """Switch adapters of each kind of expert, with dropout and jitter, beside plain and mixlora adapters."""
    return [
        spec("switch", "a", "switch", experts=4, balance_loss=0.5, dropout=0.2, jitter=0.1, **options),
        spec("switch", "b", "switch", experts=4, balance_loss=0.5, dropout=0.2, jitter=0.1, **options),
        spec("switch", "c", "fswitch", expert="flora", experts=3, top_k=1, balance_loss=0.5, **options),
        spec("switch", "a", "iswitch", expert="ia3", experts=3, top_k=3, **options),
        *mixlora_specs(**options)[:1],
        *mixed_specs(**options)[:4],
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.quick("reentrant-sgd", "accumulation-adamw")
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    lr = {"adamw": 2e-3, "sgd": 0.4}[optimizer]
    specs = switch_specs(lr=lr)
    options = {"optimizer": optimizer, "examples_per_draw": 2, "tokens_per_step": 180, **options}
    together = make_trainer(specs, tmp_path, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    assert any(max(plan.draws.values(), default=0) > 1 for plan in plans)
    train_together(together, plans)
    assert min(moved(together).values()) > 1e-3
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences
