"""Routed adapters of each kind of expert beside plain ones, and the settings that they are trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flora_train.adapters.spec import AdapterSpec
from tests.conftest import mixed_specs, spec

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"tokens_per_microbatch": 48},
    "reentrant": {"checkpointing": "reentrant"},
    "non_reentrant": {"checkpointing": "non_reentrant", "tokens_per_microbatch": 48},
}
LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.35}
OF_RANDOM = {"experts": 4, "balance_loss": 0.5, "dropout": 0.2, "jitter": 0.1}


def mixlora_specs(lr: float) -> list[AdapterSpec]:
    """MixLoRA adapters of each kind of expert, with dropout, jitter and top_p, beside plain adapters.

    Where two experts are as probable up to rounding, rounding chooses between them: routed adapters learn
    more slowly here, so that it does not grow.
    """
    options = {"lr": lr / 2}
    return [
        spec("mixlora", "a", "mix", **OF_RANDOM, **options),
        spec("mixlora", "b", "mix", **OF_RANDOM, **options),
        spec("mixlora", "c", "fmix", expert="flora", experts=3, top_k=1, balance_loss=0.5, **options),
        spec("mixlora", "a", "imix", expert="ia3", experts=3, top_k=3, top_p=0.5, **options),
        *mixed_specs(lr=lr)[:4],
    ]


def switch_specs(lr: float) -> list[AdapterSpec]:
    """Switch adapters of each kind of expert, with dropout and jitter, beside plain and MixLoRA adapters."""
    options = {"lr": lr / 2}
    return [
        spec("switch", "a", "switch", **OF_RANDOM, **options),
        spec("switch", "b", "switch", **OF_RANDOM, **options),
        spec("switch", "c", "fswitch", expert="flora", experts=3, top_k=1, balance_loss=0.5, **options),
        spec("switch", "a", "iswitch", expert="ia3", experts=3, top_k=3, **options),
        *mixlora_specs(lr)[:1],
        *mixed_specs(lr=lr)[:4],
    ]


SPECS: dict[str, Callable[[float], list[AdapterSpec]]] = {"mixlora": mixlora_specs, "switch": switch_specs}
"""Method -> its adapters beside others, for a learning rate."""
