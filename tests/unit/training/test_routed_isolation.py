"""MixLoRA and Switch adapters trained among others equal themselves trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.training.harness import check_isolation
from tests.unit.training.routed_specs import CHECKPOINTING, LEARNING_RATES, SPECS


@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.quick(
    "reentrant-sgd-mixlora", "accumulation-adamw-mixlora", "reentrant-sgd-switch", "accumulation-adamw-switch"
)
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any], method: str
) -> None:
    specs = SPECS[method](LEARNING_RATES[optimizer])
    options = {"optimizer": optimizer, "examples_per_draw": 2, "tokens_per_step": 180, **options}
    plans = check_isolation(specs, tmp_path, **options)
    assert any(max(plan.draws.values(), default=0) > 1 for plan in plans)
