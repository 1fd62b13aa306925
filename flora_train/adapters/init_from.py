"""Completes and checks adapters that start from PEFT adapters (init_from), before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import Tensor, nn

from flora_train.adapters.methods import Target
from flora_train.adapters.peft_config import check_harmless
from flora_train.adapters.peft_equivalents import as_lora, without_zero_ranks
from flora_train.adapters.peft_tensors import (
    PREFIX,
    SUFFIXES,
    check_targets,
    check_tensors,
    read_files,
    split_head,
    with_whole_names,
)
from flora_train.adapters.routed.init_from import KEYS as ROUTED_KEYS
from flora_train.adapters.routed.init_from import resolve_routed
from flora_train.adapters.spec import AdapterSpec, make_spec, scaling_of
from flora_train.adapters.subtracted_init import find_initial, plain_config
from flora_train.adapters.targets import find_targets, shortest_suffixes
from flora_train.config.adapter_schema import ROUTED, AdapterConfig
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.config.name_patterns import value_for
from flora_train.config.preference_schema import REFERRED
from flora_train.config.schema import RunConfig
from flora_train.models.loading import empty_model

PEFT_TYPES = {
    "flora": ("HIRA", "FLORA", "LORA", "ADALORA"),
    "lora": ("LORA", "ADALORA"),
    "dora": ("LORA", "ADALORA"),
    "ia3": ("IA3",),
    "head": ("LORA", "ADALORA", "HIRA", "FLORA", "IA3"),
}
"""Method -> the PEFT types of adapters that it can start from."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeftOutline:
    """What a PEFT adapter is, without its numbers."""

    source: str
    peft_type: str
    rank: int | None
    """Rank of B A; None for IA3."""
    alpha: float | None
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_dora: bool
    """Whether a LORA is a DoRA."""
    variant: str | None
    """Of a FLORA; None for other types."""
    shapes: Mapping[str, tuple[int | None, int | None]]
    """Module -> (outputs, inputs) of the layer that it adapts; None where the tensors do not show it."""
    feedforward: frozenset[str]
    """IA3: the modules whose input is scaled."""
    base: str | None
    """Name of its base model."""


def resolve_init_from(config: RunConfig, begun: RunConfig | None = None) -> RunConfig:
    """The configuration with rank, alpha, rslora, variant and layers of the PEFT adapters that init_from
    names, where it leaves them out.

    begun: the configuration with which the run began, if it is resumed: its values are kept. Raises UserError
    with all adapters that are missing, damaged or do not fit.
    """
    adapters: dict[str, AdapterConfig] = {}
    problems: list[Problem] = []
    base_model: list[nn.Module] = []

    def model() -> nn.Module:
        if not base_model:
            base_model.append(empty_model(config.model))
        return base_model[0]

    for family, adapter in config.adapters.items():
        before = begun.adapters.get(family) if begun is not None else None
        if adapter.init_from is None:
            adapters[family] = adapter
        elif before is not None and (before.init_from, before.method) == (adapter.init_from, adapter.method):
            adapters[family] = adapter.model_copy(
                update={key: getattr(before, key) for key in _left_out(adapter)}
            )
        else:
            try:
                adapters[family] = _resolve_and_check(config, family, adapter, model)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return config.model_copy(update={"adapters": adapters})


LORA_KEYS = ("rank", "rank_pattern", "alpha", "alpha_pattern", "rslora")


def _left_out(adapter: AdapterConfig) -> list[str]:
    """Keys that are read from the PEFT adapter."""
    keys = {
        "flora": ("rank", "rank_pattern", "variant"),
        "lora": LORA_KEYS,
        "dora": LORA_KEYS,
        "ia3": ("feedforward_modules",),
        "head": (),
        **dict.fromkeys(ROUTED, ROUTED_KEYS),
    }[adapter.method]
    missing = [key for key in keys if getattr(adapter, key) is None]
    return [*missing, "target_modules"] if adapter.target_modules == "default" else missing


def _resolve_and_check(
    config: RunConfig, family: str, adapter: AdapterConfig, model: Callable[[], nn.Module]
) -> AdapterConfig:
    key = f"adapters.{family}"
    if adapter.method == "head":
        for task in adapter.tasks or config.tasks:
            check_has_head(str(adapter.init_from).replace("{task}", task), f"{key}.init_from")
        return adapter
    if adapter.method in ROUTED:
        return resolve_routed(config, family, adapter, model)
    outlines: dict[str, PeftOutline] = {}
    problems: list[Problem] = []
    by_source: dict[str, PeftOutline] = {}
    for task in adapter.tasks or config.tasks:
        source = str(adapter.init_from).replace("{task}", task)
        try:
            if source not in by_source:
                by_source[source] = read_outline(
                    source, f"{key}.init_from", [name for name, _ in model().named_modules()]
                )
            outlines[task] = by_source[source]
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise UserError(*problems)
    for outline in by_source.values():
        if outline.peft_type not in PEFT_TYPES[adapter.method]:
            types = " or ".join(PEFT_TYPES[adapter.method])
            hint = (
                f"has the PEFT type {outline.peft_type}, and "
                f"an adapter of method {adapter.method} starts from {types}"
            )
            raise user_error(f"{key}.init_from", outline.source, hint)
        if outline.is_dora and adapter.method != "dora":
            hint = f"is a DoRA, and an adapter of method {adapter.method} cannot start from it: "
            hint += "set method to dora"
            raise user_error(f"{key}.init_from", outline.source, hint)
        _check_modules(outline, key, config, model())
    values = {
        name: _agreed(name, list(by_source.values()), adapter, key, model()) for name in _left_out(adapter)
    }
    resolved = adapter.model_copy(update=values)
    for task, outline in outlines.items():
        _check_fit(
            make_spec(task, family, resolved, default_steps=config.training.steps), outline, adapter, model()
        )
    return resolved


def check_has_head(source: str, key: str) -> None:
    """Raises UserError unless the PEFT adapter has a head."""
    _, _, head = split_head(*read_files(source, key))
    if not head:
        hint = "has no head (modules_to_save), and an adapter of method head starts from one"
        raise user_error(key, source, hint)


def read_outline(source: str, key: str, model_modules: Sequence[str]) -> PeftOutline:
    """What the PEFT adapter in a folder or on the hub is. model_modules: all module names of the base model.

    Raises UserError, naming `key`, for an adapter that is missing, damaged or has options that no adapter
    here has.
    """
    config, tensors, _ = split_head(*read_files(source, key))
    check_harmless(config, source, key)
    modules = check_tensors(config, tensors, source, key=key)
    tensors = with_whole_names(tensors, modules, model_modules)
    modules = check_tensors(config, tensors, source, key=key)
    if modules <= set(model_modules):
        check_targets(config, modules, model_modules, source=source, key=key)
    peft_type = config.peft_type
    shapes = {module: _layer_shape(peft_type, module, tensors) for module in sorted(modules)}
    if peft_type == "HIRA":
        config, _ = without_zero_ranks(config, tensors)
    elif peft_type == "ADALORA":
        config, _ = as_lora(config, tensors)
    find_initial(config, source, key)
    is_dora, config = config.is_dora, plain_config(config)
    return PeftOutline(
        source=source,
        peft_type=peft_type,
        rank=config.rank,
        alpha=config.alpha,
        rslora=peft_type == "LORA" and config.rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        is_dora=is_dora,
        variant=config.variant if peft_type == "FLORA" else None,
        shapes=shapes,
        feedforward=frozenset(
            module for module, (outputs, _) in shapes.items() if peft_type == "IA3" and outputs is None
        ),
        base=config.base_model,
    )


def _layer_shape(peft_type: str, module: str, tensors: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """(outputs, inputs) of an adapted layer, as its tensors show them."""
    if peft_type == "IA3":
        rows, columns = tensors[f"{PREFIX}{module}.ia3_l"].shape
        return (None, columns) if rows == 1 else (rows, None)
    down, up = (tensors[f"{PREFIX}{module}.{suffix}"] for suffix in SUFFIXES[peft_type][:2])
    return up.shape[0], down.shape[1]


def _agreed(
    name: str, outlines: Sequence[PeftOutline], adapter: AdapterConfig, key: str, model: nn.Module
) -> Any:
    """The value of a key that the recipe leaves out. Raises UserError where the adapters of several tasks
    differ in it."""
    first, *others = outlines
    value = value_of(name, first, adapter, model)
    for other in others:
        theirs = value_of(name, other, adapter, model)
        if theirs != value:
            hint = (
                f"has {name} {theirs!r}, and {first.source} has {value!r}: give their tasks "
                "separate adapters (adapters.*.tasks)"
            )
            raise user_error(f"{key}.init_from", other.source, hint)
    return value


def value_of(name: str, outline: PeftOutline, adapter: AdapterConfig, model: nn.Module) -> Any:
    """The value of a key of an entry that starts from this PEFT adapter."""
    modules = [module for module, _ in model.named_modules() if module]
    if name == "target_modules":
        return shortest_suffixes(modules, outline.shapes)
    if name == "feedforward_modules":
        return shortest_suffixes(outline.shapes, outline.feedforward)
    if name == "rank":
        return None if outline.rank is None else outline.rank - _extra_ranks(outline, adapter.variant)
    if name == "rank_pattern" and _is_fitted(adapter, outline) and adapter.rank is not None:
        return None
    if name == "rank_pattern":
        more = _extra_ranks(outline, adapter.variant)
        return {pattern: rank - more for pattern, rank in outline.rank_pattern.items()} or None
    return {
        "alpha": outline.alpha,
        "alpha_pattern": dict(outline.alpha_pattern) or None,
        "rslora": outline.rslora,
        "variant": outline.variant or adapter.variant,
    }[name]


def _is_fitted(adapter: AdapterConfig, outline: PeftOutline) -> bool:
    """Whether the adapter is a fLoRA close to a LORA, whose rank is free."""
    return adapter.method == "flora" and outline.peft_type in ("LORA", "ADALORA")


def _extra_ranks(outline: PeftOutline, variant: str | None) -> int:
    """Ranks that the equivalent adapter here does not have: a pure fLoRA is a HIRA of one rank more."""
    return int(outline.peft_type == "HIRA" and variant == "pure")


def _check_modules(outline: PeftOutline, key: str, config: RunConfig, model: nn.Module) -> None:
    """Raises UserError where the adapter has tensors for layers that the base model lacks."""
    known = {name for name, _ in model.named_modules()}
    missing = [module for module in outline.shapes if module not in known]
    trained_on = f" (it was trained on {outline.base})" if outline.base else ""
    if missing:
        hint = (
            f"has tensors for {missing[0]}, which {config.model.path} lacks: "
            f"its base model differs{trained_on}"
        )
        raise user_error(f"{key}.init_from", outline.source, hint)
    if outline.base is not None and PurePath(outline.base).name != PurePath(config.model.path).name:
        if referring := _referring_tasks(key, config):
            hint = (
                f"is the reference of {referring[0]}, and was trained on the base model {outline.base}: give "
                "an adapter of this base (if it is the same base under another name, correct "
                "base_model_name_or_path in its adapter_config.json)"
            )
            raise user_error(f"{key}.init_from", outline.source, hint)
        logger.warning(
            "%s.init_from: %s was trained on the base model %s, and model.path is %s",
            key,
            outline.source,
            outline.base,
            config.model.path,
        )


def _referring_tasks(key: str, config: RunConfig) -> list[str]:
    """The tasks whose objective compares this adapter with its initial state."""
    adapter = config.adapters[key.removeprefix("adapters.")]
    tasks = adapter.tasks or list(config.tasks)
    return [f"tasks.{task}" for task in tasks if config.tasks[task].objective in REFERRED]


def _check_fit(spec: AdapterSpec, outline: PeftOutline, written: AdapterConfig, model: nn.Module) -> None:
    """Raises UserError where the adapter of a run differs from the one that it starts from. written: the
    recipe's entry."""
    key, source = f"adapters.{spec.family}", outline.source
    if outline.variant is not None and outline.variant != ("residual" if spec.offset else "pure"):
        raise user_error(
            f"{key}.variant", written.variant, f"is not that of {source}: set it to {outline.variant}"
        )
    from_lora = spec.method == "flora" and outline.peft_type in ("LORA", "ADALORA")
    if from_lora and not spec.offset:
        raise user_error(f"{key}.variant", written.variant, "cannot start from a LORA: set it to residual")
    if spec.method != "ia3" and not from_lora:
        _check_ranks(spec, outline)
    if spec.method in ("lora", "dora") and outline.alpha is not None:
        _check_scaling(spec, outline, written)
    targets = find_targets(model, spec)
    _check_layers(spec, outline, written, set(targets))
    for module in outline.shapes:
        target = targets[module]
        if spec.method == "ia3" and target.feedforward != (module in outline.feedforward):
            side = "input" if module in outline.feedforward else "output"
            hint = (
                f"does not fit {source}, which scales the {side} of {module}: remove this key, "
                "so that it is read from there"
            )
            raise user_error(f"{key}.feedforward_modules", written.feedforward_modules, hint)
    check_sizes(outline, targets, f"{key}.init_from", source=source)


def check_sizes(outline: PeftOutline, targets: Mapping[str, Target], key: str, *, source: str) -> None:
    """Raises UserError where a layer has another size than in the PEFT adapter."""
    for module, (outputs, inputs) in outline.shapes.items():
        target = targets[module]
        if outputs not in (None, target.out_features) or inputs not in (None, target.in_features):
            theirs = " x ".join(str(size) for size in (outputs, inputs) if size is not None)
            hint = (
                f"adapts {module} as a layer of size {theirs}, and here it is {target.out_features} x "
                f"{target.in_features}: "
                "its base model differs"
            )
            raise user_error(key, source, hint)


def _check_ranks(spec: AdapterSpec, outline: PeftOutline) -> None:
    """Raises UserError where a module's rank is not that of the PEFT adapter."""
    more = _extra_ranks(outline, "residual" if spec.offset else "pure")
    for module in outline.shapes:
        own, theirs = spec.at(module).rank, value_for(outline.rank_pattern, module, outline.rank)
        if theirs is None or own == theirs - more:
            continue
        option, fix = "rank", f"set it to {theirs - more}, or remove this key"
        if spec.rank_pattern or outline.rank_pattern:
            option, fix = "rank_pattern", f"{module} has {theirs - more} there: remove rank and rank_pattern"
        raise user_error(f"adapters.{spec.family}.{option}", own, f"is not that of {outline.source}: {fix}")


def _check_scaling(spec: AdapterSpec, outline: PeftOutline, written: AdapterConfig) -> None:
    """Raises UserError where a module's update is scaled otherwise than in the PEFT adapter."""
    key, source = f"adapters.{spec.family}", outline.source
    assert outline.alpha is not None
    for module in outline.shapes:
        rank = value_for(outline.rank_pattern, module, outline.rank)
        alpha = value_for(outline.alpha_pattern, module, outline.alpha)
        if rank is None or abs(scaling_of(rank, alpha, outline.rslora) - spec.at(module).scaling) <= 1e-9:
            continue
        if spec.alpha_pattern or outline.alpha_pattern:
            hint = f"is not that of {source} on {module}: remove alpha, alpha_pattern and rslora"
            raise user_error(f"{key}.alpha_pattern", spec.at(module).alpha, hint)
        name = "rslora" if spec.rslora != outline.rslora and written.rslora is not None else "alpha"
        hint = (
            f"is not that of {source}: set alpha to {outline.alpha:g} and rslora to "
            f"{str(outline.rslora).lower()}, or remove both"
        )
        raise user_error(f"{key}.{name}", getattr(spec, name), hint)


def _check_layers(spec: AdapterSpec, outline: PeftOutline, written: AdapterConfig, targets: set[str]) -> None:
    """Raises UserError where the adapter of a run is on other layers than the one that it starts from."""
    limits = ("exclude_modules", "layers_to_transform", "parent_module")
    name = "target_modules"
    if written.target_modules == "default":
        name = next((limit for limit in limits if getattr(written, limit) is not None), "parent_module")
    key, value = f"adapters.{spec.family}.{name}", getattr(written, name)
    remove = "remove this key, so that the layers are read from there"
    if surplus := sorted(targets - outline.shapes.keys()):
        hint = (
            f"selects {len(surplus)} layers that {outline.source} has no tensors for, "
            f"such as {surplus[0]}: {remove}"
        )
        raise user_error(key, value, hint)
    if absent := sorted(outline.shapes.keys() - targets):
        hint = (
            f"leaves out {len(absent)} layers that {outline.source} has tensors for, "
            f"such as {absent[0]}: {remove}"
        )
        raise user_error(key, value, hint)
