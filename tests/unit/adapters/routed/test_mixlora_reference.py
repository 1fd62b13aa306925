"""MixLoRA equals a slow loop over tokens and whole blocks in float64: values and all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.balance import balance_losses
from flora_train.adapters.routing import RowDraw
from flora_train.adapters.spec import AdapterSpec
from flora_train.models.loading import disable_dropout
from tests.architectures import GROUPED, VOCABULARY, tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.routed.reference import SlowModel, slow_balance, slow_model

OUTPUTS = {
    "llama": ("down_proj",),
    "gpt2": ("c_proj",),
    "gpt_neox": ("dense_4h_to_h",),
    "phi": ("fc2",),
    "phi3": ("down_proj",),
}
"""Architecture -> the layer that makes the output of its feed-forward block."""
EXPERTS: dict[str, dict[str, Any]] = {
    "lora": {"expert": "lora", "rank": 3, "alpha": 5.0},
    "flora": {"expert": "flora", "rank": 2},
    "ia3": {"expert": "ia3"},
}
SPARSITY: dict[str, dict[str, Any]] = {
    "top 2 of 3": {"experts": 3, "top_k": 2},
    "top 1 of 2": {"experts": 2, "top_k": 1},
    "all 3": {"experts": 3, "top_k": 3},
    "top_p": {"experts": 4, "top_k": 4, "top_p": 0.6},
}
LENGTHS = (5, 3, 1, 4, 2, 3)
"""Tokens of the rows of the batch; the others of 5 are padding."""
ROWS = ("a", "b", "a", "a", "__base__", "b")
"""The adapter of each row."""
DRAWS = (0, 0, 0, 1, None, 1)
"""The draw of each row."""


def model_of(architecture: str) -> Any:
    """A tiny model in float64."""
    if architecture != "phi3":
        return tiny_model(architecture).double().eval()
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", **GROUPED)
    disable_dropout(config)
    return AutoModelForCausalLM.from_config(config).double().eval()


def specs_of(**options: Any) -> list[AdapterSpec]:
    settings = {"balance_loss": 0.7, "target_modules": "all-linear", **options}
    return [spec("mixlora", name, "mix", **settings) for name in "ab"]


@dataclass(frozen=True)
class Results:
    """Logits of each row without padding, and by adapter its gradients and balance loss."""

    logits: list[Tensor]
    gradients: dict[str, dict[str, dict[str, Tensor]]]
    balance: dict[str, float]


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and weights of the logits, [B, T] and [B, T, V]; 0 where a row has ended."""
    generator = torch.Generator().manual_seed(3)
    longest = max(LENGTHS)
    tokens = torch.randint(2, VOCABULARY, (len(LENGTHS), longest), generator=generator)
    weights = torch.randn(len(LENGTHS), longest, VOCABULARY, generator=generator, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        weights[row, length:] = 0
    return tokens, weights


def names_of(bank: AdapterBank) -> list[str]:
    return [name if name == "__base__" else f"{name}-mix" for name in ROWS]


def computed(bank: AdapterBank) -> Results:
    """All rows in one padded batch."""
    tokens, weights = batch()
    draws_of = {name: len({d for r, d in zip(ROWS, DRAWS, strict=True) if r == name}) for name in "ab"}
    draws = [
        None if draw is None else RowDraw(draw, 1.0 / draws_of[name])
        for name, draw in zip(ROWS, DRAWS, strict=True)
    ]
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    bank.route(names_of(bank), draws=draws, lengths=LENGTHS)
    logits = bank.model(input_ids=tokens, attention_mask=mask).logits
    (logits * weights).sum().backward()
    assert bank.router.routing is not None
    balance = {name: float(loss) for name, loss in balance_losses(bank.router.routing).items()}
    gradients: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, adapter in bank.ids.items():
        pool, _ = bank.location[adapter]
        row = bank.gradient_row(adapter)
        for module, layout in pool.layout.items():
            for param, (start, shape) in layout.items():
                values = row[start : start + prod(shape)].view(shape)
                gradients.setdefault(name, {}).setdefault(module, {})[param] = values
    return Results([logits[i, :length].detach() for i, length in enumerate(LENGTHS)], gradients, balance)


@torch.no_grad()
def prefix_logits(bank: AdapterBank, row: int, length: int) -> Tensor:
    """[length, V] of the first tokens of a row, alone."""
    name = ROWS[row] if ROWS[row] == "__base__" else f"{ROWS[row]}-mix"
    tokens, _ = batch()
    with bank.routed([name]):
        return bank.model(input_ids=tokens[row : row + 1, :length]).logits[0]


def expected(architecture: str, bank: AdapterBank) -> Results:
    """Row by row, each alone and without padding."""
    tokens, weights = batch()
    logits: dict[int, Tensor] = {}
    gradients: dict[str, dict[str, dict[str, Tensor]]] = {}
    balance: dict[str, float] = {}
    for name in "ab":
        adapter = f"{name}-mix"
        leaves = {
            module: {p: value.detach().clone().requires_grad_() for p, value in params.items()}
            for module, params in bank.parameters_of(adapter).items()
        }
        own = bank.specs[bank.ids[adapter]]
        slow = slow_model(model_of(architecture), own, leaves, OUTPUTS[architecture])
        loss, losses = torch.zeros((), dtype=torch.float64), []
        for draw in (0, 1):
            rows = [i for i in range(len(ROWS)) if (ROWS[i], DRAWS[i]) == (name, draw)]
            for i in rows:
                found = slow.logits(tokens[i, : LENGTHS[i]])
                logits[i] = found.detach()
                loss = loss + (found * weights[i, : LENGTHS[i]]).sum()
            losses.append(slow_balance(slow.take_loads(), own))
        mean = torch.stack(losses).mean()
        (loss + mean).backward()
        balance[adapter] = float(mean.detach())
        gradients[adapter] = {m: {p: leaf.grad for p, leaf in params.items()} for m, params in leaves.items()}
    for i, name in enumerate(ROWS):
        if name == "__base__":
            logits[i] = SlowModel(model_of(architecture)).logits(tokens[i, : LENGTHS[i]]).detach()
    return Results([logits[i] for i in range(len(ROWS))], gradients, balance)


def attached(architecture: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> AdapterBank:
    bank = AdapterBank.attach(model_of(architecture).to(dtype), specs_of(**options), dtype=dtype)
    perturb(bank, 0.3)
    return bank


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: object) -> None:
    scale = max(1.0, float(theirs.abs().max()))
    difference = float((ours.double() - theirs).abs().max()) / scale
    assert difference <= tolerance, (what, difference)


@pytest.mark.parametrize("architecture", OUTPUTS)
@pytest.mark.parametrize("options", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("sparsity", SPARSITY.values(), ids=SPARSITY)
@pytest.mark.quick(
    "top 2 of 3-lora-llama",
    "top_p-flora-gpt2",
    "top 1 of 2-ia3-gpt_neox",
    "all 3-lora-phi",
    "top 2 of 3-flora-phi3",
    "top_p-ia3-phi3",
)
def test_values_and_gradients_are_those_of_whole_blocks(
    architecture: str, options: dict[str, Any], sparsity: dict[str, Any]
) -> None:
    bank = attached(architecture, {**options, **sparsity})
    theirs = expected(architecture, bank)
    ours = computed(bank)
    for i, row in enumerate(theirs.logits):
        assert_close(ours.logits[i], row, 1e-10, ("logits", i))
    assert ours.balance == pytest.approx(theirs.balance, rel=1e-9)
    for i, name in enumerate(ROWS):
        for length in {1, 2, LENGTHS[i]}:  # the ways of few tokens, which decoding takes
            found = prefix_logits(bank, i, min(length, LENGTHS[i]))
            assert_close(found, theirs.logits[i][: len(found)], 1e-10, ("few tokens", name, length))
    moving = 0
    for adapter, modules in theirs.gradients.items():
        for module, params in modules.items():
            for param, gradient in params.items():
                ours_here = ours.gradients[adapter][module][param]
                assert_close(ours_here, gradient, 1e-9, (adapter, module, param))
                moving += bool(gradient.abs().max() > 1e-3)
    assert moving > 10
