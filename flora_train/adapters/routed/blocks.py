"""Recognises feed-forward blocks: from which layers and activation a block makes its output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from flora_train.adapters.methods import Target
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import choices, first_line, user_error
from flora_train.models.probe_inputs import preserved_state

BlockForm = Literal["gated", "fused", "plain"]

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down: down(activation(gate x) * up x)."""
FUSED = (("gate_up_proj", "down_proj"),)
"""Names of gate and up in one matrix, and down."""
PLAIN = (
    ("up_proj", "down_proj"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc_in", "fc_out"),
)
"""Names of up and down: down(activation(up x))."""
ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation")
PROBE_TOKENS = 5
TOLERANCE = 1e-4
"""Difference, relative to the largest output, up to which a block computes what its form says."""


@dataclass(frozen=True)
class FeedForwardBlock:
    """A feed-forward block of the base model."""

    name: str
    form: BlockForm
    inputs: tuple[str, ...]
    """The layers that read the block's input: gate and up, both in one, or up alone."""
    output: str
    """The layer that makes its output."""
    activation: str
    """Name of the activation within the block."""

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)


def hidden_states(form: BlockForm, activation: Callable[[Tensor], Tensor], parts: list[Tensor]) -> Tensor:
    """The input of the output layer, from the outputs of the input layers."""
    if form == "plain":
        return activation(parts[0])
    gate, up = parts if form == "gated" else parts[0].chunk(2, dim=-1)
    return activation(gate) * up


def feedforward_blocks(model: nn.Module, layers: Collection[str]) -> dict[str, FeedForwardBlock]:
    """The feed-forward blocks of a model, by name. layers: names of its linear layers."""
    blocks = {}
    for name, module in model.named_modules():
        block = _block_of(name, module, layers)
        if block is not None:
            blocks[name] = block
    return blocks


def _block_of(name: str, module: nn.Module, layers: Collection[str]) -> FeedForwardBlock | None:
    activation = next((a for a in ACTIVATIONS if callable(getattr(module, a, None))), None)
    if activation is None:
        return None
    forms: tuple[tuple[BlockForm, tuple[tuple[str, ...], ...]], ...] = (
        ("gated", GATED),
        ("fused", FUSED),
        ("plain", PLAIN),
    )
    for form, known in forms:
        for names in known:
            paths = [f"{name}.{part}" if name else part for part in names]
            if all(path in layers for path in paths):
                return FeedForwardBlock(name, form, tuple(paths[:-1]), paths[-1], activation)
    return None


def with_blocks(
    model: nn.Module, targets: Mapping[str, Target], spec: AdapterSpec, available: Mapping[str, Target]
) -> dict[str, Target]:
    """The targets of a mixlora adapter, those in feed-forward blocks marked as experts' layers.

    available: all linear layers of the model. Raises UserError where there are none, or where a block
    computes something else than its layers say.
    """
    assert spec.experts is not None
    blocks = feedforward_blocks(model, available)
    chosen = [block for block in blocks.values() if any(layer in targets for layer in block.layers)]
    key = f"adapters.{spec.family}.method"
    if not chosen:
        kind = type(model).__name__
        if not blocks:
            known = choices(sorted({"/".join(names) for names in (*GATED, *FUSED, *PLAIN)}))
            hint = (
                f"{kind} has no feed-forward block that is recognised (a module with an activation and the "
            )
            raise user_error(key, spec.method, f"{hint}layers {known}): use another method or base model")
        example = next(iter(blocks.values())).output
        hint = f"target_modules selects no layer of a feed-forward block, such as {example}: add some"
        raise user_error(f"adapters.{spec.family}.target_modules", spec.target_modules, hint)
    marked = dict(targets)
    for block in chosen:
        width = available[block.inputs[0]].in_features
        _check(model, block, width, spec=spec)
        for layer in block.layers:
            if layer in marked:
                is_output = layer == block.output
                feedforward = is_output and spec.experts.method == "ia3"
                marked[layer] = replace(
                    marked[layer], block=block.name, block_width=width, feedforward=feedforward
                )
    return marked


@torch.no_grad()
def _check(model: nn.Module, block: FeedForwardBlock, width: int, *, spec: AdapterSpec) -> None:
    """Raises UserError unless a block computes what its form says."""
    module = model.get_submodule(block.name)
    weight = next(module.parameters())
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(weight.device)
    x = x.to(weight.dtype if weight.is_floating_point() else torch.float32)
    activation = getattr(module, block.activation)
    try:
        with preserved_state(model):
            expected = module(x)
            parts = [model.get_submodule(layer)(x) for layer in block.inputs]
            computed = model.get_submodule(block.output)(hidden_states(block.form, activation, parts))
        error = (computed - expected).abs().max() / expected.abs().max().clamp_min(1e-9)
        reason = "computes something else than its layers and activation say"
        is_known = computed.shape == expected.shape and float(error) <= TOLERANCE
    except Exception as failure:
        is_known, reason = False, f"cannot be run alone: {type(failure).__name__}: {first_line(failure)}"
    if not is_known:
        hint = f"the feed-forward block {block.name} of {type(model).__name__} is not recognised: it {reason}"
        key = f"adapters.{spec.family}.method"
        raise user_error(key, spec.method, f"{hint}; use another method or base model")
