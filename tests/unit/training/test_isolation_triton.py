"""Trained together equals trained alone, with the Triton kernels: interpreted here, compiled on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.kernels.backend import use_backend
from flora_train.kernels.flora import cost_model
from flora_train.kernels.flora import op as flora
from flora_train.kernels.flora.cost_model import Thresholds
from tests.conftest import mixed_specs
from tests.triton_device import DEVICE
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    plans_of,
    train_together,
)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.full), "adamw"])
def test_trained_together_equals_trained_alone(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    formulation = flora.formulation
    monkeypatch.setattr(flora, "formulation", lambda name: used.append(name) or formulation(name))
    monkeypatch.setattr(
        cost_model, "thresholds_for", lambda work: Thresholds(100, 0, 0, 0)
    )  # forming W0 * M costs nothing
    options = {
        "optimizer": optimizer,
        "device": str(DEVICE),
        "tokens_per_step": 40,
        "tokens_per_microbatch": 32,
    }
    specs = mixed_specs(lr={"adamw": 2e-3, "sgd": 0.3}[optimizer])
    together = make_trainer(
        [specs[i] for i in (0, 1, 4, 5)], tmp_path, **options
    )  # every method, fLoRA both ways
    plans = plans_of(together, 2)
    train_together(together, plans)
    assert set(used) == {"fused", "scaled"}
    assert min(moved(together).values()) > 1e-4
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


def test_triton_without_a_gpu_or_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"kernels.backend.*triton.*needs a GPU.*leave it at auto"):
        use_backend("triton", torch.device("cpu"))
