"""Finds the adapted layer that comes first in a forward, whose input decides about all layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.methods import Target
from flora_train.adapters.routed.blocks import feedforward_blocks
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.models.probe_inputs import preserved_state, probe_inputs

ROWS, LENGTH = 2, 4
"""Rows and tokens of the probe."""
DECODER_LENGTH = 3
"""Tokens of a decoder beside an encoder: another number, so that both can be told apart."""


def with_first_layer(
    model: nn.Module, targets: Mapping[str, Target], spec: AdapterSpec, available: Mapping[str, Target]
) -> dict[str, Target]:
    """The targets of a switch adapter, of which the first in a forward decides.

    Runs the model on a few tokens. Of a model that cannot run, such as one without weights, the first by
    definition decides. available: all linear layers of the model. Raises UserError where the targets do not
    all read the same tokens.
    """
    assert spec.experts is not None
    calls = observed_calls(model, targets)
    _check_tokens(model, calls, spec)
    first = next(iter(calls), next(iter(targets)))
    outputs: Collection[str] = ()
    if spec.experts.method == "ia3":
        outputs = {block.output for block in feedforward_blocks(model, available).values()}
    return {
        name: replace(target, decides=name == first, feedforward=name in outputs)
        for name, target in targets.items()
    }


def observed_calls(model: Any, names: Collection[str]) -> dict[str, Fraction]:
    """The layers in the order of their first call in a forward -> the tokens of a row that they read; empty
    for a model that cannot run."""
    calls: dict[str, Fraction] = {}
    try:
        inputs = probe_inputs(model, ROWS, LENGTH)
        if inputs is None:
            return {}
        if "decoder_input_ids" in inputs:
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :DECODER_LENGTH]
        with preserved_state(model), torch.no_grad(), _observed(model, names, calls):
            model(**inputs)
    except Exception:  # layer_usage.py reports why a model with weights cannot run
        return {}
    return calls


@contextmanager
def _observed(model: nn.Module, names: Collection[str], calls: dict[str, Fraction]) -> Iterator[None]:
    """Write the calls of these layers into `calls`."""

    def note(name: str, x: Tensor) -> None:
        tokens = Fraction(x.numel() // x.shape[-1], ROWS)
        if calls.setdefault(name, tokens) != tokens:
            calls[name] = Fraction(-1)

    handles = []
    for name in names:
        layer = model.get_submodule(name)
        handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_tokens(model: nn.Module, calls: Mapping[str, Fraction], spec: AdapterSpec) -> None:
    """Raises UserError where a layer reads other tokens than the first, whose decision it would need."""
    if not calls:
        return
    first, *rest = calls
    other = next((name for name in rest if calls[name] != calls[first]), None)
    if other is None and calls[first] >= 0:
        return
    hint = f"one decision for a token cannot hold in all of these layers of {type(model).__name__}: "
    if other is None:
        hint += f"{first} reads different numbers of tokens"
    else:
        hint += f"{other} reads other tokens than {first}, which comes first"
    hint += "; select layers of one part of the model with target_modules, parent_module or exclude_modules"
    raise user_error(f"adapters.{spec.family}.target_modules", spec.target_modules, hint)
