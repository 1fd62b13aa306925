"""Routed adapters on tasks with heads, embeddings and preferences train beside plain ones as if alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flora_train.adapters.spec import AdapterSpec
from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.preferences.preference import Preference
from tests.conftest import spec
from tests.unit.adapters.gate_reference import LORAS, gate_spec
from tests.unit.training.harness import check_isolation
from tests.unit.training.routed_specs import OF_RANDOM

RATES = {"adamw": 1e-3, "sgd": 0.1}
LABELS = {
    "three": LabelSpec("single", ("x", "y", "z"), (0.5, 1.0, 2.0)),
    "tags": LabelSpec("tokens", ("O", "B", "I"), (0.3, 1.0, 1.0)),
    "number": LabelSpec("regression"),
}
EMBEDDINGS = {
    "b": EmbeddingSpec("mean", 0.1, symmetric=True),
    "c": EmbeddingSpec("last", 0.2, has_negatives=True),
}
PREFERENCES = {
    "b": Preference("dpo", 0.5, label_smoothing=0.1, sft_weight=0.3),
    "c": Preference("kto", 0.5, desirable_weight=1.5),
}
COUPLED = {"tokens_per_step": 700, "tokens_per_microbatch": 256, "examples_per_draw": 3}


def mixloras(*tasks: str, lr: float) -> list[AdapterSpec]:
    """A MixLoRA of each kind of expert, on tasks in turn."""
    one, two, three = (tasks[number % len(tasks)] for number in range(3))
    return [
        spec("mixlora", one, "mix", **OF_RANDOM, lr=lr),
        spec("mixlora", two, "fmix", expert="flora", experts=3, top_k=1, balance_loss=0.5, lr=lr),
        spec("mixlora", three, "imix", expert="ia3", experts=3, top_p=0.5, lr=lr),
    ]


def switches(*tasks: str, lr: float) -> list[AdapterSpec]:
    """A Switch of each kind of expert, on tasks in turn."""
    one, two, three = (tasks[number % len(tasks)] for number in range(3))
    return [
        spec("switch", one, "switch", **OF_RANDOM, lr=lr),
        spec("switch", two, "fswitch", expert="flora", experts=3, top_k=1, balance_loss=0.5, lr=lr),
        spec("switch", three, "iswitch", expert="ia3", experts=3, lr=lr),
    ]


def gates(*tasks: str, lr: float) -> list[AdapterSpec]:
    """A gate with frozen members and one with members that are trained."""
    return [
        gate_spec(LORAS, tasks[0], "gate", gate_loss=0.0, lr=2 * lr),
        gate_spec(LORAS, tasks[-1], "trained", gate_loss=0.0, train_members=True, lr=lr),
    ]


METHODS: dict[str, Callable[..., list[AdapterSpec]]] = {
    "mixlora": mixloras,
    "switch": switches,
    "meteora": gates,
}


def plain(*tasks: str, lr: float) -> list[AdapterSpec]:
    return [spec("lora", task, rank=2, lr=lr) for task in tasks]


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick("mixlora-adamw", "meteora-sgd")
def test_heads_of_a_decoder(tmp_path: Path, method: str, optimizer: str) -> None:
    """Labels of texts and of tokens, and numbers, beside plain texts and plain adapters."""
    lr = RATES[optimizer]
    specs = [*METHODS[method](*LABELS, lr=lr), *METHODS[method]("a", lr=lr)[:1], *plain("three", "b", lr=lr)]
    settings: dict[str, Any] = {"tokens_per_step": 220, "tokens_per_microbatch": 160, "examples_per_draw": 2}
    plans = check_isolation(specs, tmp_path, labels=LABELS, optimizer=optimizer, **settings)
    mixed = [{row.task in LABELS for row in rows} for plan in plans for rows in plan.microbatches]
    assert {True, False} in mixed


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@pytest.mark.quick("bert-adamw")
def test_switches_with_heads_on_encoders(tmp_path: Path, architecture: str, optimizer: str) -> None:
    """(MixLoRA does not know the feed-forward blocks of these bases, and refuses them.)"""
    lr = RATES[optimizer]
    specs = [*switches(*LABELS, lr=lr), *plain("three", "tags", lr=lr)]
    settings: dict[str, Any] = {"tokens_per_step": 180, "tokens_per_microbatch": 128, "examples_per_draw": 2}
    check_isolation(
        specs, tmp_path, architecture=architecture, labels=LABELS, optimizer=optimizer, **settings
    )


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick("switch-sgd")
def test_embeddings(tmp_path: Path, method: str, optimizer: str) -> None:
    """Pairs and triplets, whose draws are those that the load of experts is balanced over."""
    lr = RATES[optimizer]
    specs = [*METHODS[method]("b", "c", lr=lr), *METHODS[method]("a", lr=lr)[:1], *plain(*"abc", lr=lr)]
    plans = check_isolation(
        specs, tmp_path, embeddings=EMBEDDINGS, optimizer=optimizer, least_move=3e-4, **COUPLED
    )
    mixed = [{row.task for row in rows} for plan in plans for rows in plan.microbatches]
    assert any(len(tasks) > 1 and tasks & EMBEDDINGS.keys() for tasks in mixed)


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick("mixlora-adamw", "switch-sgd")
def test_preferences(tmp_path: Path, method: str, optimizer: str) -> None:
    """DPO and KTO, whose rows of a reference and of a KL term are not balanced."""
    lr = RATES[optimizer]
    specs = [*METHODS[method]("b", "c", lr=lr), *METHODS[method]("a", lr=lr)[:1], *plain(*"abc", lr=lr)]
    # Where a gradient is a rounding error, AdamW's step without eps would be as large as any other.
    plans = check_isolation(
        specs, tmp_path, preferences=PREFERENCES, optimizer=optimizer, eps=1e-6, least_move=3e-4, **COUPLED
    )
    mixed = [{row.task for row in rows} for plan in plans for rows in plan.microbatches]
    assert any(len(tasks) > 1 and tasks & PREFERENCES.keys() for tasks in mixed)
