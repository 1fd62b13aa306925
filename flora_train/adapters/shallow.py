"""Adapters of a model as adapters of the same model with fewer layers, on which a plan measures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from flora_train.adapters.layer_usage import numberless
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import find_targets, linear_layers
from flora_train.config.name_patterns import is_regex


def on_shallow_model(spec: AdapterSpec, shallow: nn.Module, full: nn.Module) -> AdapterSpec:
    """The adapter on a model with fewer layers.

    Where its targets or ranks depend on the number of a layer, every layer gets all targets that any layer
    has, with their largest rank.
    """
    if not _depends_on_layers(spec):
        return spec
    rank_of: dict[str, int] = {}
    for name in find_targets(full, spec):
        pattern = numberless(name)
        rank_of[pattern] = max(rank_of.get(pattern, 0), spec.at(name).rank)
    layers = [name for name in linear_layers(shallow) if numberless(name) in rank_of]
    weights = [name for name, _ in shallow.named_parameters() if numberless(name) in rank_of]
    names = [*layers, *weights]
    ranks: tuple[tuple[str, int], ...] = ()
    if spec.rank_pattern:
        ranks = tuple((re.escape(name), rank_of[numberless(name)]) for name in names)
    return replace(
        spec,
        target_modules=tuple(layers),
        target_parameters=tuple(weights),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=(),
    )


def _depends_on_layers(spec: AdapterSpec) -> bool:
    limits = spec.exclude_modules or spec.layers_to_transform or spec.has_patterns
    names = (*spec.target_modules, *spec.target_parameters)
    return bool(limits) or is_regex(spec.target_modules) or _has_number(names)


def _has_number(names: Iterable[str]) -> bool:
    return any(part.isdigit() for name in names for part in name.split("."))
