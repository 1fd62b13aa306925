"""Heads of all kinds, mixed with each other and with plain adapters, train as if each were alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flora_train.adapters.spec import AdapterSpec
from flora_train.data.labels.spec import LabelSpec
from tests.conftest import spec
from tests.unit.training.harness import check_isolation

LABELS: Mapping[str, LabelSpec] = {
    "three": LabelSpec("single", ("x", "y", "z"), (0.5, 1.0, 2.0)),
    "two": LabelSpec("single", ("n", "y")),
    "many": LabelSpec("multi", ("p", "q", "r", "s")),
    "number": LabelSpec("regression"),
    "tags": LabelSpec("tokens", ("O", "B", "I"), (0.3, 1.0, 1.0)),
}
RATES = {"sgd": 0.2, "adamw": 2e-3}


def label_specs(**options: Any) -> list[AdapterSpec]:
    """A head of each size and kind, each with another method, and one alone."""
    lr = options["lr"]
    return [
        spec("flora", "three", rank=3, variant="residual", head_lr=lr / 2, **options),
        spec("lora", "three", rank=2, **options),
        spec("head", "three", **options),
        spec("flora", "two", "pure", rank=2, variant="pure", **options),
        spec("lora", "many", rank=2, lr_ratio=2.0, **options),
        spec("ia3", "number", **options),
        replace(spec("lora", "tags", rank=2, **options), dropout=0.1),
        spec("head", "tags", weight_decay=0.1, **options),
    ]


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_heads_trained_together_equal_those_trained_alone(
    tmp_path: Path, architecture: str, optimizer: str
) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "tokens_per_step": 180, "tokens_per_microbatch": 128}
    specs = label_specs(lr=RATES[optimizer])
    plans = check_isolation(specs, tmp_path, architecture=architecture, labels=LABELS, **settings)
    assert any(len({row.task for row in rows}) > 2 for plan in plans for rows in plan.microbatches)


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_heads_of_a_decoder_train_beside_plain_adapters(
    tmp_path: Path, architecture: str, optimizer: str
) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "tokens_per_step": 220, "tokens_per_microbatch": 160}
    lr = RATES[optimizer]
    fast = lr
    if (architecture, optimizer) == ("gpt2", "sgd"):  # its random weights are small
        fast = 100 * lr
    plain = [
        spec("flora", "a", rank=3, variant="residual", lr=fast),
        spec("lora", "b", rank=2, lr=lr),
        spec("ia3", "c", lr=lr),
    ]
    specs = [*plain, *label_specs(lr=lr)]
    plans = check_isolation(specs, tmp_path, architecture=architecture, labels=LABELS, **settings)
    mixed = [{row.task in LABELS for row in rows} for plan in plans for rows in plan.microbatches]
    assert {True, False} in mixed
