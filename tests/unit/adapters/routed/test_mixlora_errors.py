"""Wrong settings of routed adapters are told with key, value and correction, before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.data.balanced_draws import balance_problem
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.training.harness import random_split

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "top_k above the experts": (
        {"experts": 4, "top_k": 5},
        r"adapters\.mix\.top_k = 5: is more than the 4 experts: lower it",
    ),
    "top_k above the default": ({"top_k": 9}, r"adapters\.mix\.top_k = 9: is more than the 8 experts"),
    "unknown experts": ({"expert": "dora"}, r"adapters\.mix\.expert = 'dora': .*lora"),
    "no expert": ({"experts": 0}, r"adapters\.mix\.experts = 0"),
    "rank of ia3": (
        {"expert": "ia3", "rank": 4},
        r"adapters\.mix\.rank = 4: has no meaning for experts of method ia3; it belongs to lora and flora",
    ),
    "dropout of flora": (
        {"expert": "flora", "dropout": 0.1},
        r"adapters\.mix\.dropout = 0\.1: has no meaning for experts of method flora; it belongs to lora",
    ),
    "alpha of ia3": ({"expert": "ia3", "alpha": 4.0}, r"adapters\.mix\.alpha = 4\.0: has no meaning"),
    "variant": ({"expert": "flora", "variant": "pure"}, r"adapters\.mix\.variant = 'pure': has no meaning"),
    "balance of lora": (
        {"method": "lora", "balance_loss": 0.1},
        r"adapters\.mix\.balance_loss = 0\.1: has no meaning for method lora; "
        r"it belongs to mixlora and switch: remove it",
    ),
    "balance of meteora": (
        {"method": "meteora", "over": ["a", "b"], "balance_loss": 0.1},
        r"adapters\.mix\.balance_loss = 0\.1: has no meaning for method meteora",
    ),
    "negative balance": ({"balance_loss": -0.1}, r"adapters\.mix\.balance_loss = -0\.1"),
    "experts of lora": (
        {"method": "lora", "experts": 4},
        r"adapters\.mix\.experts = 4: has no meaning for method lora; it belongs to mixlora and switch",
    ),
    "top_p of switch": ({"method": "switch", "top_p": 0.5}, r"adapters\.mix\.top_p = 0\.5: has no meaning"),
    "jitter": ({"jitter": 1.0}, r"adapters\.mix\.jitter = 1\.0"),
    "layers of ia3": (
        {"expert": "ia3", "feedforward_modules": ["down_proj"]},
        r"adapters\.mix\.feedforward_modules = .*: has no meaning for method mixlora",
    ),
}


@pytest.mark.parametrize(("options", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused_before_the_model_is_loaded(
    options: dict[str, Any], expected: str
) -> None:
    raw = {
        "name": "run",
        "model": {"path": "unused"},
        "tasks": {"a": {"train": "unused.jsonl"}},
        "adapters": {"mix": {"method": "mixlora", "lr": 1e-3, **options}},
    }
    with pytest.raises(UserError, match=expected):
        validate(raw)


@pytest.mark.parametrize("architecture", ["opt", "bert", "t5", "whisper"])
def test_a_base_whose_blocks_are_not_recognised_is_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(UserError) as caught:
        AdapterBank.attach(model, [spec("mixlora", "a", "mix", target_modules="all-linear")])
    (problem,) = caught.value.problems
    assert problem.key == "adapters.mix.method"
    assert problem.value == "mixlora"
    assert type(model).__name__ in problem.hint
    assert "use another method or base model" in problem.hint


class Doubled(nn.Module):
    """A feed-forward block with the usual layers that computes something else."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = block.gate_proj, block.up_proj, block.down_proj
        self.act_fn = block.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_block_that_computes_something_else_is_refused() -> None:
    model: Any = tiny_model()
    model.model.layers[1].mlp = Doubled(model.model.layers[1].mlp)
    expected = (
        r"adapters\.mix\.method = 'mixlora': the feed-forward block model\.layers\.1\.mlp .*something else"
    )
    with pytest.raises(UserError, match=expected):
        AdapterBank.attach(model, [spec("mixlora", "a", "mix")])
    layers = {"layers_to_transform": [0], "target_modules": ["up_proj", "q_proj"]}
    bank = AdapterBank.attach(model, [spec("mixlora", "a", "mix", **layers)])
    assert set(bank.parameters_of("a-mix")) == {
        "model.layers.0.mlp",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
    }


def test_targets_without_feed_forward_layers_are_refused() -> None:
    expected = (
        r"adapters\.mix\.target_modules = .*q_proj.*: target_modules selects no layer of a feed-forward "
        r"block, such as model\.layers\.0\.mlp\.down_proj: add some"
    )
    with pytest.raises(UserError, match=expected):
        AdapterBank.attach(tiny_model(), [spec("mixlora", "a", "mix", target_modules=["q_proj", "v_proj"])])


def test_base_dropout_within_a_block_is_not_in_its_formula() -> None:
    """The base's dropout is off wherever the library loads it; the check does not depend on the mode."""
    model: Any = tiny_model("gpt2").train()
    for layer in model.transformer.h:
        layer.mlp.dropout.p = 0.5
    bank = AdapterBank.attach(model, [spec("mixlora", "a", "mix")])
    assert model.training
    assert "transformer.h.0.mlp" in bank.parameters_of("a-mix")


@pytest.mark.parametrize(
    ("balance", "microbatch", "refused"), [(0.1, 20, True), (0.0, 20, False), (0.1, 28, False)]
)
def test_a_draw_must_fit_into_a_micro_batch(balance: float, microbatch: int, refused: bool) -> None:
    config = validate(
        {
            "name": "run",
            "model": {"path": "unused"},
            "tasks": {"a": {"train": "unused.jsonl"}},
            "adapters": {
                "lora": {"method": "lora", "lr": 1e-3},
                "mix": {"method": "mixlora", "lr": 1e-3, "balance_loss": balance},
            },
            "training": {"steps": 8, "tokens_per_step": 90, "max_length": 16},
        }
    )
    split = random_split(0, 40)
    assert split.lengths.max() == 14
    problem = balance_problem("a", split, config.adapters, examples=2, tokens_per_microbatch=microbatch)
    assert (problem is not None) == refused
    if problem is not None:
        assert str(problem).startswith(
            "training.tokens_per_microbatch = 20: cannot hold a draw of 2 examples"
        )
        assert "raise it to 28" in problem.hint
