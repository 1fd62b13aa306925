"""A plan of a mixture of experts counts its experts' operations and what adapters on them keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_train.adapters.pool import build_pools
from flora_train.adapters.shallow import on_shallow_model
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import find_targets
from flora_train.config.model_schema import ModelConfig
from flora_train.training.step_memory import BatchShape, measure_shapes
from tests.architectures import tiny_model
from tests.conftest import spec

ROWS, TOKENS, WIDTH, INNER, EXPERTS, USED, LAYERS = 4, 16, 32, 24, 4, 2, 2
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def specs() -> list[AdapterSpec]:
    return [spec("lora", rank=3, target_modules=["q_proj"], target_parameters=BOTH)]


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_a_plan_counts_experts(architecture: str, tmp_path: Path) -> None:
    model: Any = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    config, batch = ModelConfig(path=str(tmp_path)), BatchShape(ROWS, TOKENS)
    pools, _ = build_pools(model, specs())
    with_experts = measure_shapes(config, pools, batch)
    attention, _ = build_pools(model, [spec("lora", rank=3, target_modules=["q_proj"])])
    without = measure_shapes(config, attention, batch)
    pairs = ROWS * TOKENS * USED
    of_experts = LAYERS * 2 * pairs * 3 * WIDTH * INNER
    assert with_experts.flops == without.flops
    attention_alone = LAYERS * 2 * ROWS * TOKENS * WIDTH * (2 * 32 + 2 * 16)
    scores = 4 * ROWS * LAYERS * WIDTH * (TOKENS**2 // 2)
    assert with_experts.flops == of_experts + attention_alone + scores
    inputs = LAYERS * pairs * (WIDTH + INNER + 2 * 3) * 2
    assert with_experts.kept - without.kept >= inputs


def test_parameters_of_an_adapter_on_experts_are_counted() -> None:
    pools, left_out = build_pools(tiny_model("qwen3_moe"), specs())
    attention = 3 * (WIDTH + 32)
    experts = EXPERTS * 3 * (WIDTH + 2 * INNER) + EXPERTS * 3 * (INNER + WIDTH)
    assert pools[0].row_size == LAYERS * (attention + experts)
    assert left_out == {}


def test_an_adapter_of_one_layer_s_experts_is_measured_on_a_shallow_model() -> None:
    model = tiny_model("olmoe")
    own = spec("lora", rank=3, target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"])
    shallow = on_shallow_model(own, model, model)
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(LAYERS)]
    assert list(find_targets(model, shallow)) == names
