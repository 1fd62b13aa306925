"""An adapter whose targets depend on the number of a layer, on a model with fewer layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flora_train.adapters.shallow import on_shallow_model
from flora_train.adapters.targets import find_targets
from tests.architectures import architecture_config, auto_class, tiny_model
from tests.conftest import spec


def model_of(layers: int) -> Any:
    config = architecture_config("llama")
    config.num_hidden_layers = layers
    with torch.device("meta"):
        return auto_class(config).from_config(config)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [5], "target_modules": ["q_proj"]},
        {"target_modules": r".*\.5\..*q_proj"},
        {"target_modules": ["layers.5.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*(v_proj|\.[0-4]\..*)"},
        {"target_modules": ["q_proj"], "rank_pattern": {r"5\..*": 7}, "alpha_pattern": {r"4\..*": 2}},
    ],
    ids=str,
)
def test_every_layer_has_the_targets_of_any_layer(options: dict[str, Any]) -> None:
    ours = spec("lora", rank=2, **options)
    shallow = on_shallow_model(ours, model_of(1), model_of(6))
    targets = find_targets(model_of(1), shallow)
    assert [*targets] == ["model.layers.0.self_attn.q_proj"]
    assert shallow.at(next(iter(targets))).rank == max(options.get("rank_pattern", {"": 2}).values())


def test_other_adapters_are_as_they_were() -> None:
    for method in ("flora", "lora", "dora", "ia3"):
        ours = spec(method)
        assert on_shallow_model(ours, tiny_model(), model_of(6)) is ours
