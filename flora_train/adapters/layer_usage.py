"""Finds the linear layers that no adapter can be attached to, by running the model on a few tokens, before adapters are attached."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.targets import linear_layers
from flora_train.config.errors import first_line, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.models.loading import zero_model
from flora_train.models.probe_inputs import gradients_enabled, preserved_state, probe_inputs
from flora_train.models.quantized import is_quantized

SHAPES = ((2, 6), (3, 3))
"""Rows and tokens of the probes: unequal, with numbers that divide; and equal, where a sequence-first layout looks like rows."""
NOT_RUN, NO_GRADIENT, MAKES_LOGITS = "does not run", "gets no gradient", "makes the logits"
WHOLE, FIRST_LAYERS = 10**9, 4
"""Numbers of the largest model that is probed whole without its numbers, and the layers of a larger one."""
MOST_SAID = 4
"""Parts of a model that are named for one reason."""
ALIKE = 0.1
"""Relative difference up to which two inputs of a layer are the same but for rounding."""
ROUNDING = 0.03
"""Relative difference up to which an output is the product with the weight but for rounding, in 16 bits too."""


@dataclass
class _Calls:
    """What one layer got and gave in a forward."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    marks: list[Tensor] = field(default_factory=list)
    """Per call, for every vector of the input its mean and mean size, [..., 2]."""
    faults: list[str] = field(default_factory=list)
    gradient: bool = False


def unusable_layers(model: nn.Module, names: Iterable[str], features: Tensor | None = None) -> dict[str, str]:
    """Which of these linear layers no adapter can be attached to, and why. features: [1, ...] of a clip, for a speech model.

    Runs the model three times on nine to twelve tokens. Everything is usable in a module that is no model of transformers. Raises
    UserError where the model cannot run, or puts its rows where no layer can tell them apart.
    """
    names = tuple(names)
    if not hasattr(getattr(model, "config", None), "model_type") or not names:
        return {}
    (rows, length), (same, also) = SHAPES
    inputs, square = probe_inputs(model, rows, length, features), probe_inputs(model, same, also, features)
    if inputs is None or square is None:
        return {}
    try:
        # the first as in training: some models take other paths then
        with preserved_state(model, training=True), gradients_enabled(model, every=True):
            first, encoded, head = _observe(model, names, _asking(inputs))
        with preserved_state(model), torch.no_grad():
            turned, _, _ = _observe(model, names, {key: value.flip(0) for key, value in inputs.items()})
            second, encoded_square, _ = _observe(model, names, square)
    except Exception as error:
        words = f"cannot run on {rows} rows of {length} tokens, as training would: {type(error).__name__}: {first_line(error)}"
        raise user_error("model", type(model).__name__, words) from error
    for calls, batch, lengths in ((first, rows, {length, encoded}), (second, same, {also, encoded_square})):
        for name, seen in calls.items():
            faults = [_layout(model, name, shape, batch, lengths) for shape in seen.shapes]
            seen.faults += [words for words in faults if words is not None]
    alone: dict[str, str] = {}
    for name in names:
        reason = _reason(name, first.get(name), second.get(name), head)
        if reason is not None:
            alone[name] = reason
    reasons = _whole_lists(alone, first)
    used = [name for name in names if name not in reasons]
    if any(_mixes(first[name], turned[name], rows) for name in used):
        with preserved_state(model), torch.no_grad():
            first, _, _ = _observe(model, names, inputs)  # without what is random while it trains
        for name in used:
            if _mixes(first[name], turned[name], rows):
                raise user_error(
                    "model",
                    type(model).__name__,
                    f"mixes its rows before {name}: adapters would meet rows of others",
                )
    return reasons


def unusable_by_shape(config: ModelConfig, empty: nn.Module, features: Tensor | None = None) -> dict[str, str]:
    """`unusable_layers` of a model that is not loaded (`empty`: without numbers), as far as numbers do not matter: asked of one whose
    numbers are 0, of a large one of its first layers. {} where that cannot run."""
    names = tuple(linear_layers(empty))
    whole = sum(parameter.numel() for parameter in empty.parameters()) <= WHOLE
    try:
        model = zero_model(config) if whole else zero_model(config, FIRST_LAYERS)
        found = unusable_layers(model, linear_layers(model), features)
    except Exception:  # a run finds out when it has loaded the model
        return {}
    if whole:
        return found
    kinds, seen = (
        {numberless(name): reason for name, reason in found.items()},
        {numberless(n) for n in linear_layers(model)},
    )
    usable = {numberless(name) for name in linear_layers(model) if name not in found}
    return {name: kinds[kind] for name in names if (kind := numberless(name)) in kinds and kind in seen - usable}


def _reason(name: str, first: _Calls | None, second: _Calls | None, head: str | None) -> str | None:
    if first is None or second is None:
        return NOT_RUN
    if name == head:
        return MAKES_LOGITS
    if first.faults or second.faults:
        return (first.faults or second.faults)[0]
    return None if first.gradient else NO_GRADIENT


def _whole_lists(reasons: Mapping[str, str], calls: Mapping[str, _Calls]) -> dict[str, str]:
    """Experts of one list stand or fall together: which tokens one of them gets changes with every batch."""
    found, lists = (
        dict(reasons),
        {place: reason for name, reason in reasons.items() for place in _lists(name)},
    )
    for name, seen in calls.items():
        if name not in found and any(len(shape) == 2 for shape in seen.shapes):
            for place in lists.keys() & set(_lists(name)):
                found[name] = lists[place]
    return found


def _lists(name: str) -> Iterator[str]:
    """The lists that a module may be an entry of: its name with one of its numbers as `*`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part[-1:].isdigit():
            yield ".".join([*parts[:i], part.rstrip("0123456789") + "*", *parts[i + 1 :]])


def numberless(name: str) -> str:
    """A module name with its numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _layout(model: nn.Module, name: str, shape: tuple[int, ...], rows: int, lengths: set[int | None]) -> str | None:
    """What is wrong with an input of this shape; None for rows that an adapter's layer can tell apart."""
    if len(shape) > 2 and shape[0] == rows:
        return None
    if len(shape) == 2 and shape[0] in {rows * length for length in lengths if length is not None}:
        return None
    if len(shape) > 2 and rows in shape[1:-1]:
        words = f"does not have its rows first: {name} gets {list(shape)} for {rows} rows, where adapters cannot tell rows apart"
        raise user_error("model", type(model).__name__, words)
    return "gets tokens that are not in rows (as experts do)"


def _mixes(straight: _Calls, turned: _Calls, rows: int) -> bool:
    """Whether turning the batch's rows round does something else to a layer's input than turning its rows round."""
    if len(straight.marks) != len(turned.marks):
        return True
    for one, other in zip(straight.marks, turned.marks, strict=True):
        if one.shape != other.shape:
            return True
        before, after = (mark.reshape(rows, -1) for mark in (one, other))
        if before.isfinite().all() and (after.flip(0) - before).norm() > ALIKE * before.norm():
            return True
    return False


def _observe(model: Any, names: Iterable[str], inputs: Mapping[str, Tensor]) -> tuple[dict[str, _Calls], int | None, str | None]:
    """One forward: what the named layers get and give; positions of the encoder's output; the layer whose output is the logits."""
    calls: dict[str, _Calls] = defaultdict(_Calls)
    outputs: dict[str, Tensor] = {}
    lengths: list[int] = []

    def look(name: str, module: nn.Module, x: Any, y: Any) -> None:
        seen = calls[name]
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            seen.faults.append(f"gives a {type(y).__name__}, not a tensor" if isinstance(x, Tensor) else "gets no tensor")
            return
        seen.shapes.append(tuple(x.shape))
        seen.gradient |= y.requires_grad
        values = x.detach().float()
        seen.marks.append(torch.stack([values.mean(-1), values.abs().mean(-1)], -1))
        if (words := _not_linear(module, x, y)) is not None:
            seen.faults.append(words)
        outputs[name] = y

    with _watched(model, names, look, lengths):
        logits = getattr(model(**inputs, use_cache=False), "logits", None)
    head = None
    if isinstance(logits, Tensor):
        head = next((name for name, y in outputs.items() if y.data_ptr() == logits.data_ptr() and y.numel()), None)
    return dict(calls), lengths[0] if lengths else None, head


def _asking(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, sounds among them asking for gradients, so that these flow through an encoder."""
    return {key: value.detach().requires_grad_(value.is_floating_point()) for key, value in inputs.items()}


@contextmanager
def _watched(model: Any, names: Iterable[str], look: Any, lengths: list[int]) -> Iterator[None]:
    def of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            look(name, module, args[0] if args else next(iter(kwargs.values()), None), output)

        return hook

    def encoded(module: nn.Module, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        lengths.extend([hidden.shape[1]] if isinstance(hidden, Tensor) and hidden.dim() == 3 else [])

    handles = [model.get_submodule(name).register_forward_hook(of(name), with_kwargs=True) for name in names]
    if getattr(model.config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        handles.append(model.get_encoder().register_forward_hook(encoded))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _not_linear(module: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """What a layer does that is not the product with its weight: then neither the method's formula nor a merge would hold."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or is_quantized(module):
        return None
    words = f"is a {type(module).__name__}, which is not the product with its weight"
    if x.shape[-1] != module.in_features or y.shape != (*x.shape[:-1], module.out_features):
        return words
    expected = F.linear(x.to(module.weight.dtype), module.weight, module.bias).float()
    return words if (y.float() - expected).norm() > ROUNDING * expected.norm() + 1e-6 else None


def described(reasons: Mapping[str, str], usable: Iterable[str]) -> str:
    """The layers left out, in one line: whole parts of the model by their name, numbers as `*`."""
    kept = list(usable)
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        parts[reason, _part(name, kept)].append(name)
    said: dict[str, list[str]] = defaultdict(list)
    for (reason, part), names in parts.items():
        kinds = {numberless(name) for name in names}
        said[reason].append(f"{kinds.pop() if len(kinds) == 1 else part}{f' ({len(names)})' if len(names) > 1 else ''}")
    return "; ".join(
        f"{', '.join(sorted(words)[:MOST_SAID])}{', ...' if len(words) > MOST_SAID else ''}: {why}" for why, words in said.items()
    )


def _part(name: str, kept: list[str]) -> str:
    """The highest module above a layer that has no usable layer below it."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if not any(other.startswith(prefix) for other in kept):
            return numberless(prefix[:-1])
    return numberless(name)
