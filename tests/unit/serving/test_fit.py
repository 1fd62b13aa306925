"""An adapter that does not fit the served model is refused with the reason."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.serving.adapter_files import LoraFolder
from flora_train.serving.fit import LayerFacts, check_fits
from flora_train.serving.lora_folders import LayerShapes
from flora_train.serving.multipliers import MultiplicativeAdapter, Multiplier

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
LAYERS = {Q: LayerFacts(8, 6), DOWN: LayerFacts(12, 8)}
FLORA = MultiplicativeAdapter(
    "flora",
    {
        Q: Multiplier(torch.ones(2, 8), torch.ones(6, 2)),
        DOWN: Multiplier(torch.ones(3, 12), torch.ones(8, 3)),
    },
)
IA3 = MultiplicativeAdapter(
    "ia3",
    {
        Q: Multiplier(torch.ones(1, 1), torch.ones(6, 1), scales_output=True),
        DOWN: Multiplier(torch.ones(1, 12), torch.ones(1, 1)),
    },
)
LORA = LoraFolder(Path("x"), {Q: LayerShapes(8, 6, 4), DOWN: LayerShapes(12, 8, 2)})


def check(
    adapter: LoraFolder | MultiplicativeAdapter, layers: dict[str, LayerFacts], max_rank: int = 16
) -> None:
    check_fits(adapter, layers, max_rank=max_rank, source="lua-flora")


@pytest.mark.parametrize("adapter", [FLORA, IA3, LORA])
def test_fitting_adapters_are_accepted(adapter: LoraFolder | MultiplicativeAdapter) -> None:
    check(adapter, LAYERS, adapter.rank)
    check(adapter, {**LAYERS, "lm_head": LayerFacts(8, 99, "head")})


@pytest.mark.parametrize("adapter", [FLORA, IA3, LORA])
@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({DOWN: LayerFacts(13, 8)}, "adapts model.layers.0.mlp.down_proj as .*12, and here it is 8 x 13"),
        ({Q: LayerFacts(8, 7)}, "adapts .*q_proj as 6 x .*, and here it is 7 x 8: .* another base model"),
        ({Q: None}, r"adapts .*q_proj, which the served model lacks \(1 of 2 layers"),
        ({Q: None, DOWN: None}, r"adapts .*, which the served model lacks \(2 of 2 layers"),
    ],
)
def test_other_base_models_are_refused(
    adapter: LoraFolder | MultiplicativeAdapter, changed: dict[str, LayerFacts | None], reason: str
) -> None:
    layers = {name: facts for name, facts in {**LAYERS, **changed}.items() if facts is not None}
    with pytest.raises(UserError, match=f"adapter = 'lua-flora': {reason}"):
        check(adapter, layers)


@pytest.mark.parametrize(("limit", "rank", "allowed"), [(1, 3, 8), (2, 3, 8), (8, 9, 16), (256, 300, 320)])
def test_the_error_of_a_rank_names_the_option(limit: int, rank: int, allowed: int) -> None:
    lora = replace(LORA, layers={Q: LayerShapes(8, 6, rank)})
    with pytest.raises(
        UserError, match=f"has rank {rank}, and the limit is {limit}: .*--max-lora-rank {allowed}"
    ):
        check(lora, LAYERS, limit)


def test_a_rank_that_vllm_never_serves() -> None:
    with pytest.raises(UserError, match="vLLM serves ranks up to 512"):
        check(replace(LORA, layers={Q: LayerShapes(8, 6, 513)}), LAYERS)


@pytest.mark.parametrize("adapter", [FLORA, IA3])
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (LayerFacts(8, 6, "embedding"), "adapts .*q_proj, an embedding: "),
        (LayerFacts(8, 6, "head"), "adapts .*q_proj, the output layer: "),
        (LayerFacts(8, 6, "experts"), "adapts .*q_proj, a layer of experts: "),
        (LayerFacts(8, 6, obstacle="is quantised"), "adapts .*q_proj, which is quantised: "),
    ],
)
def test_layers_without_exact_products_are_refused(
    adapter: MultiplicativeAdapter, facts: LayerFacts, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        check(adapter, {**LAYERS, Q: facts})
    check(LORA, {**LAYERS, Q: facts})


def test_a_bias_that_is_added_later_concerns_a_scale_of_outputs_only() -> None:
    with pytest.raises(UserError, match="whose bias vLLM adds elsewhere"):
        check(IA3, {**LAYERS, Q: LayerFacts(8, 6, bias_is_added_later=True)})
    check(IA3, {**LAYERS, DOWN: LayerFacts(12, 8, bias_is_added_later=True)})
    check(FLORA, {**LAYERS, Q: LayerFacts(8, 6, bias_is_added_later=True)})


def test_experts_are_named() -> None:
    name = "model.layers.0.mlp.experts.3.up_proj"
    adapter = MultiplicativeAdapter("flora", {name: Multiplier(torch.ones(1, 8), torch.ones(6, 1))})
    with pytest.raises(UserError, match=f"adapts {re.escape(name)}, a layer of experts"):
        check(adapter, LAYERS)


def test_modules_that_vllm_leaves_out_are_not_missed() -> None:
    lora = replace(LORA, layers={**LORA.layers, "mtp.layers.0.q_proj": LayerShapes(8, 6, 2)})
    with pytest.raises(UserError, match="which the served model lacks"):
        check(lora, LAYERS)
    check_fits(lora, LAYERS, max_rank=16, source="x", ignored_prefixes=["mtp."])
