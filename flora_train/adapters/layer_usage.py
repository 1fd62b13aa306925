"""Finds the linear layers that no adapter can be attached to, by running the model on a few tokens before
training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.fused_experts import fused_experts
from flora_train.adapters.targets import linear_layers
from flora_train.config.errors import first_line, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import zero_model
from flora_train.models.probe_inputs import gradients_enabled, preserved_state, probe_inputs
from flora_train.models.quantized import is_quantized

SHAPES = ((2, 6), (3, 3))
"""Rows and tokens of the probes: one of different numbers, one of equal numbers, where a sequence-first
layout has the same shape as rows."""
NOT_RUN, NO_GRADIENT, MAKES_LOGITS = "does not run", "gets no gradient", "makes the logits"
MAX_WHOLE_PARAMETERS = 10**9
"""Parameters of the largest model that is probed completely without its weights."""
FIRST_LAYERS = 4
"""Layers of a larger model that are probed."""
MAX_NAMED = 4
"""Parts of a model that are named for one reason."""
MAX_INPUT_DIFFERENCE = 0.1
"""Relative difference between two inputs of a layer that rounding can cause."""
MAX_OUTPUT_DIFFERENCE = 0.03
"""Relative difference between an output and the product with the weight that rounding can cause, in 16
bits."""


@dataclass
class _Calls:
    """The inputs and outputs of one layer in a forward."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)
    """Per call, the mean and mean magnitude of every vector of the input, [..., 2]."""
    faults: list[str] = field(default_factory=list)
    gradient: bool = False


class _Observation(NamedTuple):
    """One forward of the model."""

    calls: dict[str, _Calls]
    encoder_length: int | None
    """Positions of the encoder's output."""
    head: str | None
    """The layer whose output is the logits."""


def unusable_layers(model: nn.Module, names: Iterable[str], features: Tensor | None = None) -> dict[str, str]:
    """The named linear layers that no adapter can be attached to -> the reason. features: [1, ...] of a clip,
    for a speech model.

    Runs the model three times on nine to twelve tokens. A module that is not a transformers model has no
    unusable layers. Raises UserError where the model cannot run, or arranges its rows so that no layer can
    distinguish them.
    """
    names = tuple(names)
    if not hasattr(getattr(model, "config", None), "model_type") or not names:
        return {}
    (rows, length), (square_rows, square_length) = SHAPES
    inputs = probe_inputs(model, rows, length, features)
    square_inputs = probe_inputs(model, square_rows, square_length, features)
    if inputs is None or square_inputs is None:
        return {}
    reversed_inputs = {key: value.flip(0) for key, value in inputs.items()}
    try:
        # The first in training mode, in which some models take other paths.
        with preserved_state(model, training=True), gradients_enabled(model, every=True):
            first = _observe(model, names, _requiring_grad(inputs))
        with preserved_state(model), torch.no_grad():
            in_reverse = _observe(model, names, reversed_inputs)
            square = _observe(model, names, square_inputs)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        hint = f"cannot run on {rows} rows of {length} tokens, as training would: {reason}"
        raise user_error("model", type(model).__name__, hint) from error
    _add_layout_faults(model, first, rows, length=length)
    _add_layout_faults(model, square, square_rows, length=square_length)
    reasons: dict[str, str] = {}
    for name in names:
        fault = _reason(name, first.calls.get(name), square.calls.get(name), head=first.head)
        if fault is not None:
            reasons[name] = fault
    reasons = _extend_to_lists(reasons, first.calls)
    used = [name for name in names if name not in reasons]
    _check_rows(model, used, first, in_reverse=in_reverse, inputs=inputs)
    return reasons


def _check_rows(
    model: nn.Module,
    names: list[str],
    first: _Observation,
    *,
    in_reverse: _Observation,
    inputs: Mapping[str, Tensor],
) -> None:
    """Raises UserError where the order of the batch's rows changes more than the order of a layer's rows."""
    rows, _ = SHAPES[0]
    if not any(_mixes_rows(first.calls[name], in_reverse.calls[name], rows) for name in names):
        return
    # Repeated without what is random in training mode.
    with preserved_state(model), torch.no_grad():
        first = _observe(model, names, inputs)
    for name in names:
        if _mixes_rows(first.calls[name], in_reverse.calls[name], rows):
            hint = f"mixes its rows before {name}: adapters would get rows of other adapters"
            raise user_error("model", type(model).__name__, hint)


def unusable_by_shape(
    config: ModelConfig, empty: nn.Module, features: Tensor | None = None
) -> dict[str, str]:
    """`unusable_layers` of a model that is not loaded, as far as it does not depend on the weights.

    empty: the model without weights. A model with weights of 0 is run; of a large model, its first layers.
    Returns {} where that cannot run.
    """
    names = (*linear_layers(empty), *fused_experts(empty))
    is_small = sum(parameter.numel() for parameter in empty.parameters()) <= MAX_WHOLE_PARAMETERS
    try:
        model = zero_model(config) if is_small else zero_model(config, FIRST_LAYERS)
        unusable = unusable_layers(model, [*linear_layers(model), *fused_experts(model)], features)
    except Exception:  # the run reports it once it has loaded the model
        return {}
    if is_small:
        return unusable
    reasons = {numberless(name): reason for name, reason in unusable.items()}
    layers = [*linear_layers(model), *fused_experts(model)]
    usable = {numberless(name) for name in layers if name not in unusable}
    by_shape = {}
    for name in names:
        pattern = numberless(name)
        if pattern in reasons and pattern not in usable:
            by_shape[name] = reasons[pattern]
    return by_shape


def _reason(name: str, first: _Calls | None, square: _Calls | None, *, head: str | None) -> str | None:
    if first is None or square is None:
        return NOT_RUN
    if name == head:
        return MAKES_LOGITS
    faults = first.faults or square.faults
    if faults:
        return faults[0]
    return None if first.gradient else NO_GRADIENT


def _extend_to_lists(reasons: Mapping[str, str], calls: Mapping[str, _Calls]) -> dict[str, str]:
    """Experts of one list are all unusable if one is: the tokens that each of them gets change with every
    batch."""
    extended = dict(reasons)
    reason_of_list: dict[str, str] = {}
    for name, reason in reasons.items():
        reason_of_list |= dict.fromkeys(_lists(name), reason)
    for name, seen in calls.items():
        if name not in extended and any(len(shape) == 2 for shape in seen.shapes):
            for pattern in reason_of_list.keys() & set(_lists(name)):
                extended[name] = reason_of_list[pattern]
    return extended


def _lists(name: str) -> Iterator[str]:
    """The lists that a module may be an entry of: its name with one of its numbers as `*`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part[-1:].isdigit():
            yield ".".join([*parts[:i], part.rstrip("0123456789") + "*", *parts[i + 1 :]])


def numberless(name: str) -> str:
    """A module name with its numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _add_layout_faults(model: nn.Module, observation: _Observation, rows: int, *, length: int) -> None:
    token_counts = {rows * length}
    if observation.encoder_length is not None:
        token_counts.add(rows * observation.encoder_length)
    for name, seen in observation.calls.items():
        for shape in seen.shapes:
            fault = _layout_fault(model, name, shape, rows=rows, token_counts=token_counts)
            if fault is not None:
                seen.faults.append(fault)


def _layout_fault(
    model: nn.Module, name: str, shape: tuple[int, ...], *, rows: int, token_counts: set[int]
) -> str | None:
    """What is wrong with an input of this shape; None if an adapter's layer can distinguish its rows."""
    if len(shape) > 2 and shape[0] == rows:
        return None
    if len(shape) == 2 and shape[0] in token_counts:
        return None
    if len(shape) > 2 and rows in shape[1:-1]:
        layout = f"{name} gets {list(shape)} for {rows} rows"
        hint = f"does not have its rows first: {layout}, where adapters cannot distinguish rows"
        raise user_error("model", type(model).__name__, hint)
    return "gets tokens that are not in rows (as experts do)"


def _mixes_rows(in_order: _Calls, in_reverse: _Calls, rows: int) -> bool:
    """Whether reversing the batch's rows does more to a layer's input than reversing its rows."""
    if len(in_order.statistics) != len(in_reverse.statistics):
        return True
    for ordered, reverse in zip(in_order.statistics, in_reverse.statistics, strict=True):
        if ordered.shape != reverse.shape:
            return True
        before, after = ordered.reshape(rows, -1), reverse.reshape(rows, -1)
        difference = (after.flip(0) - before).norm()
        if before.isfinite().all() and difference > MAX_INPUT_DIFFERENCE * before.norm():
            return True
    return False


def _observe(model: Any, names: Iterable[str], inputs: Mapping[str, Tensor]) -> _Observation:
    """Run one forward and record the inputs and outputs of the named layers."""
    calls: dict[str, _Calls] = defaultdict(_Calls)
    outputs: dict[str, Tensor] = {}
    encoder_lengths: list[int] = []

    def record(name: str, module: nn.Module, x: Any, y: Any) -> None:
        seen = calls[name]
        if not isinstance(x, Tensor):
            seen.faults.append("gets no tensor")
            return
        if not isinstance(y, Tensor):
            seen.faults.append(f"returns a {type(y).__name__}, not a tensor")
            return
        seen.shapes.append(tuple(x.shape))
        seen.gradient |= y.requires_grad
        values = x.detach().float()
        seen.statistics.append(torch.stack([values.mean(-1), values.abs().mean(-1)], -1))
        if (fault := _nonlinear_fault(module, x, y)) is not None:
            seen.faults.append(fault)
        outputs[name] = y

    with _recorded(model, names, record, encoder_lengths=encoder_lengths):
        logits = getattr(model(**inputs, use_cache=False), "logits", None)
    encoder_length = next(iter(encoder_lengths), None)
    return _Observation(dict(calls), encoder_length, _head(outputs, logits))


def _head(outputs: Mapping[str, Tensor], logits: Any) -> str | None:
    if isinstance(logits, Tensor):
        for name, output in outputs.items():
            if output.data_ptr() == logits.data_ptr() and output.numel():
                return name
    return None


def _requiring_grad(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs; audio among them requires grad, so that gradients flow through an encoder."""
    return {key: value.detach().requires_grad_(value.is_floating_point()) for key, value in inputs.items()}


@contextmanager
def _recorded(
    model: Any,
    names: Iterable[str],
    record: Callable[[str, nn.Module, Any, Any], None],
    *,
    encoder_lengths: list[int],
) -> Iterator[None]:
    """Call `record` for every call of the named layers, and collect the lengths of the encoder's outputs."""

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = next(iter([*args, *kwargs.values()]), None)
            record(name, module, first, output)

        return hook

    def record_encoder(module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            encoder_lengths.append(hidden.shape[1])

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True) for name in names
    ]
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        handles.append(model.get_encoder().register_forward_hook(record_encoder))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _nonlinear_fault(module: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """What a layer does beyond the product with its weight: then neither the method's formula nor a merge
    would be correct."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or is_quantized(module):
        return None
    fault = f"is a {type(module).__name__}, which does not compute the product with its weight"
    if x.shape[-1] != module.in_features or y.shape != (*x.shape[:-1], module.out_features):
        return fault
    expected = F.linear(x.to(module.weight.dtype), module.weight, module.bias).float()
    tolerance = MAX_OUTPUT_DIFFERENCE * expected.norm() + 1e-6
    if (y.float() - expected).norm() > tolerance:
        return fault
    return None


def describe_left_out(reasons: Mapping[str, str], usable: Iterable[str]) -> str:
    """The layers without adapters, in one line: complete parts of the model by their name, numbers as `*`."""
    usable = list(usable)
    names_of_part: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        names_of_part[reason, _part(name, usable)].append(name)
    parts_of_reason: dict[str, list[str]] = defaultdict(list)
    for (reason, part), names in names_of_part.items():
        patterns = {numberless(name) for name in names}
        label = patterns.pop() if len(patterns) == 1 else part
        if len(names) > 1:
            label += f" ({len(names)})"
        parts_of_reason[reason].append(label)
    sentences = []
    for reason, parts in parts_of_reason.items():
        named = ", ".join(sorted(parts)[:MAX_NAMED])
        if len(parts) > MAX_NAMED:
            named += ", ..."
        sentences.append(f"{named}: {reason}")
    return "; ".join(sentences)


def _part(name: str, usable: list[str]) -> str:
    """The highest module above a layer that has no usable layer below it."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if not any(other.startswith(prefix) for other in usable):
            return numberless(prefix[:-1])
    return numberless(name)
