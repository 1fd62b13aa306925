"""A model whose rows are not independent in training is refused by name; any other stays unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flora_train.config.errors import UserError
from flora_train.models.loading import set_mode
from flora_train.models.probe_inputs import noise_features
from flora_train.training.row_check import check_rows
from tests.architectures import ARCHITECTURES, tiny_model
from tests.other_speech import KINDS, extractor_of, loaded_tiny
from tests.speech import loaded_tiny_whisper, tiny_extractor

CAUSAL = [name for name in ARCHITECTURES if name not in ("t5", "whisper")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", CAUSAL)
def test_model_with_independent_rows_is_accepted(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype).requires_grad_(False)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_rows(model, pad_token=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["whisper", *KINDS])
def test_speech_models_are_let_through(kind: str) -> None:
    model, extractor = (
        (loaded_tiny_whisper(), tiny_extractor())
        if kind == "whisper"
        else (loaded_tiny(kind), extractor_of(kind))
    )
    check_rows(model, model.config.pad_token_id, noise_features(extractor))


class Spoilt(nn.Module):
    """A layer whose output another rule changes."""

    def __init__(self, inner: nn.Module, rule: Any) -> None:
        super().__init__()
        self.inner, self.rule = inner, rule

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rule(self.inner(x))
        return y


RULES = {
    "mixes the rows of a batch": lambda y: y + y.mean(0, keepdim=True),
    "sees the tokens that it is to predict": lambda y: y + y.mean(1, keepdim=True),
    r"changes a row's (loss by \d+%|gradient) .*; rows meet in model\.layers\.1\.mlp\.down_proj": lambda y: (
        y.roll(y.shape[1], -1)
    ),
    r"changes a row's loss by \d+% ": lambda y: (
        y * (1 - 4 * (torch.arange(y[..., 0].numel()).view(*y.shape[:2], 1) >= 20))
    ),
    "draws random numbers": lambda y: y + torch.randn_like(y),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", RULES)
def test_rows_that_meet_are_refused_by_name(words: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(dtype=dtype)
    model.model.layers[1].mlp.down_proj = Spoilt(model.model.layers[1].mlp.down_proj, RULES[words])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.inner.weight.mul_(30)
    with pytest.raises(UserError, match=rf"^model = 'LlamaForCausalLM': {words}"):
        check_rows(model, pad_token=0)


def test_a_model_that_cannot_compute_losses_is_refused() -> None:
    model: Any = tiny_model()
    model.model.layers[0].mlp.down_proj = nn.Linear(5, 5)
    with pytest.raises(
        UserError,
        match=r"^model = 'LlamaForCausalLM': cannot compute losses of a few rows, as training would",
    ):
        check_rows(model, pad_token=0)


def test_training_mode_is_that_of_modules_that_recompute_alone() -> None:
    """A batch norm in training mode would mix rows; so would the random numbers of a dropout or a router."""
    model: Any = tiny_model()
    model.model.layers[0].mlp.norm = nn.BatchNorm1d(3)
    set_mode(model, training=True)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.layers[0].mlp.norm.training
    set_mode(model, training=False)
    assert not any(module.training for module in model.modules())
