"""A list of seeds makes an adapter for each; it is no sweep, as no seed is better than another."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import load_config, save_config, validate
from tests.unit.config.test_sweep import config, raw


def test_seeds_are_adapters_that_are_no_sweep() -> None:
    found = config(seed=[0, 1, 12]).adapters
    assert list(found) == ["x_seed0", "x_seed1", "x_seed12"]
    assert [(a.seed, a.sweep, a.seeds_of) for a in found.values()] == [
        (0, None, "x"),
        (1, None, "x"),
        (12, None, "x"),
    ]


@pytest.mark.parametrize("seed_first", [True, False])
def test_seeds_of_a_sweep_are_grouped_by_the_other_keys(seed_first: bool) -> None:
    keys = {"seed": [0, 1], "lr": [2e-3, 4e-3]}
    if not seed_first:
        keys = dict(reversed(keys.items()))
    found = config(**keys).adapters
    assert len(found) == 4
    for name, adapter in found.items():
        assert (adapter.sweep, adapter.seeds_of) == ("x", f"x_lr{adapter.lr * 1000:g}e-3")
        assert f"seed{adapter.seed}" in name


def test_one_seed_changes_no_name() -> None:
    (adapter,) = config(seed=3).adapters.values()
    assert (adapter.seed, adapter.sweep, adapter.seeds_of) == (3, None, None)


def test_what_is_saved_is_the_same_run(tmp_path: Any) -> None:
    found = config(seed=[0, 1], lr=[2e-3, 4e-3], ema_decay=0.99, lr_ratio=4, neftune_noise_alpha=5)
    save_config(found, tmp_path / "saved.yaml")
    assert load_config([f"recipe={tmp_path / 'saved.yaml'}"]) == found


def test_options_of_the_optimizer_can_be_swept() -> None:
    found = config(lr_ratio=[1, 16], neftune_noise_alpha=[5, 10], ema_decay=[0.9, 0.99]).adapters
    assert len(found) == 8
    assert "x_lr_ratio16_neftune_noise_alpha5_ema_decay9e-1" in found


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"method": "ia3", "seed": 1}, r"seed = 1: has no effect.*neftune_noise_alpha"),
        ({"method": "flora", "rank": 1, "variant": "pure", "seed": [0, 1]}, r"seed = 0: has no effect"),
        ({"init_from": "folder", "seed": 1}, r"seed = 1: has no effect"),
        ({"seed": -1}, r"seed = -1: must be at least 0"),
        ({"seed": [1, 1]}, r"adapters\.x\.seed = 1: is in this sweep twice"),
        ({"seed": []}, r"adapters\.x\.seed = \[\]: is an empty sweep"),
        ({"seeds": [0, 1]}, r"seeds: unknown key.*adapters\.x\.seed"),
        ({"ema": 0.9}, r"ema: unknown key.*adapters\.x\.ema_decay"),
        ({"ema_decay": 1.0}, r"ema_decay = 1\.0: must be less than 1"),
        ({"neftune_noise_alpha": 0}, r"neftune_noise_alpha = 0: must be more than 0"),
        ({"neftune": 5}, r"neftune: unknown key.*adapters\.x\.neftune_noise_alpha"),
    ],
)
def test_what_has_no_effect_is_refused(adapter: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**adapter)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "ia3", "neftune_noise_alpha": 5, "seed": 1},
        {"init_from": "folder", "dropout": 0.1, "seed": 1},
        {"method": "flora", "variant": "pure", "rank": 2, "seed": 1},
        {"method": "flora", "seed": 1},
    ],
)
def test_seed_of_anything_random_is_accepted(adapter: dict[str, Any]) -> None:
    assert [a.seed for a in config(**adapter).adapters.values()] == [1]


def test_halving_needs_a_sweep_of_settings() -> None:
    with pytest.raises(UserError, match=r"sweep\.strategy = 'halving': requires a sweep"):
        validate(
            raw({"x": {"method": "lora", "lr": 1e-3, "seed": [0, 1]}}, sweep={"strategy": "halving"}),
        )
