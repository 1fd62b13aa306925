"""Limits of what `target_modules` selects, as in PEFT: exclude_modules and layers_to_transform."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.name_patterns import ends_with, is_excluded, layer_index


def limited(model: nn.Module, chosen: Iterable[str], spec: AdapterSpec) -> set[str]:
    """The chosen modules that are not excluded, and are in the layers to transform.

    Raises UserError for a limit that no module of the model has, and for limits that leave no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    before = set(chosen)
    remaining = {name for name in before if not is_excluded(name, spec.exclude_modules)}
    _check_exclude(model, names, spec)
    key = f"adapters.{spec.family}"
    if before and not remaining:
        hint = f"excludes all {len(before)} modules that target_modules selects, such as {min(before)}"
        raise user_error(f"{key}.exclude_modules", _as_written(spec.exclude_modules), hint)
    if spec.layers_to_transform is None:
        return remaining
    _check_layers(model, names, spec)
    indices = {name: layer_index(name, spec.layers_pattern) for name in remaining}
    in_layers = {name for name in remaining if indices[name] in spec.layers_to_transform}
    if remaining and not in_layers:
        others = sorted({index for index in indices.values() if index is not None})
        hint = "has no layer with a module that target_modules selects"
        if others:
            hint += f"; they are in the layers {_ranges(others)}"
        raise user_error(f"{key}.layers_to_transform", list(spec.layers_to_transform), hint)
    return in_layers


def _check_exclude(model: nn.Module, names: list[str], spec: AdapterSpec) -> None:
    """Raises UserError for an entry of exclude_modules that matches no module of the model."""
    key = f"adapters.{spec.family}.exclude_modules"
    exclude = spec.exclude_modules
    last_parts = sorted({name.rpartition(".")[2] for name in names} - _numbers(names))
    if isinstance(exclude, str):
        if not any(re.fullmatch(exclude, name) for name in names):
            hint = "is a regular expression that matches the complete name of no module of "
            hint += type(model).__name__
            if any(ends_with(name, [exclude]) for name in names):
                hint += f": to exclude modules by their ending, write a list: [{exclude}]"
            raise user_error(key, exclude, hint)
        return
    for entry in exclude or ():
        if not any(ends_with(name, [entry]) for name in names):
            hint = f"matches no module of {type(model).__name__}: remove it."
            raise user_error(key, entry, hint + did_you_mean(entry, last_parts))


def _check_layers(model: nn.Module, names: list[str], spec: AdapterSpec) -> None:
    """Raises UserError for an index or a list of layers that the model does not have."""
    assert spec.layers_to_transform is not None
    key = f"adapters.{spec.family}"
    for pattern in spec.layers_pattern or ():
        if all(layer_index(name, [pattern]) is None for name in names):
            lists = {match[1] for name in names if (match := re.search(r"([^.]+)\.\d+\.", name))}
            hint = f"is no list of layers of {type(model).__name__}; it has {choices(lists)}."
            raise user_error(f"{key}.layers_pattern", pattern, hint + did_you_mean(pattern, lists))
    indices = sorted(
        {index for name in names if (index := layer_index(name, spec.layers_pattern)) is not None}
    )
    for layer in spec.layers_to_transform:
        if layer not in indices:
            hint = f"is no layer of {type(model).__name__}; it has {_ranges(indices)}"
            raise user_error(f"{key}.layers_to_transform", layer, hint)


def _numbers(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".") if part.isdigit()}


def _as_written(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _ranges(indices: list[int]) -> str:
    """Ascending numbers as `0 to 29`, or one by one where some are missing."""
    if not indices:
        return "no numbered layers"
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices))
