"""warmup_ratio follows the number of steps; warmup_steps and warmup_ratio exclude each other."""

from __future__ import annotations

import pytest

from flora_train.adapters.spec import expand
from flora_train.config.load import load_config, validate
from flora_train.config.paths import shipped
from tests.unit.config.helpers import faults, small

WARMUP_OF_RECIPES = {
    "common_voice": {100},
    "multipl_e": {50},
    "multipl_e_local": {4},
    "quickstart_sweep": {4},
    "speech_local": {8},
    "speech_sweep": {0, 4},
    "thousand": {0},
}


@pytest.mark.parametrize(
    ("ratio", "max_steps", "steps", "warmup"),
    [
        (0.1, None, 40, 4),
        (0.1, 20, 40, 2),
        (0.22, None, 18, 4),
        (0.1, None, 30, 3),
        (0.99, None, 5, 4),
        (0.5, None, 1, 0),
        (0, None, 9, 0),
    ],
)
def test_ratio_is_a_share_of_the_adapters_own_steps_of_which_one_remains(
    ratio: float, max_steps: int | None, steps: int, warmup: int
) -> None:
    config = validate(
        small(adapters__lora__warmup_ratio=ratio, adapters__lora__max_steps=max_steps, training__steps=steps)
    )
    spec = next(spec for spec in expand(config) if spec.family == "lora")
    assert spec.warmup_steps == warmup
    assert spec.warmup_steps < spec.max_steps


def test_ratio_and_steps_together_are_refused() -> None:
    found = faults(adapters__lora__warmup_steps=3, adapters__lora__warmup_ratio=0.1)
    assert found == {
        "adapters.lora.warmup_ratio": "adapters.lora.warmup_ratio = 0.1: and "
        "warmup_steps = 3 both set the warm-up: "
        "remove one of them"
    }


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1])
def test_ratio_is_a_share(ratio: float) -> None:
    assert faults(adapters__lora__warmup_ratio=ratio).keys() == {"adapters.lora.warmup_ratio"}


def test_ratio_can_be_swept() -> None:
    config = validate(small(adapters__lora__warmup_ratio=[0.1, 0.2]))
    assert [a.warmup_ratio for a in config.adapters.values()] == [0.1, 0.2, None]


@pytest.mark.parametrize("recipe", sorted(shipped("recipes")))
def test_shipped_recipe_is_shortened_by_one_key(recipe: str) -> None:
    config = load_config([f"recipe={recipe}"])
    if recipe in WARMUP_OF_RECIPES:
        assert {spec.warmup_steps for spec in expand(config)} == WARMUP_OF_RECIPES[recipe]
    for steps in (1, 3):
        short = load_config([f"recipe={recipe}", f"training.steps={steps}"])
        assert all(spec.warmup_steps < steps for spec in expand(short))
