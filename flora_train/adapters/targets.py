"""Selects the layers of a model that an adapter attaches to."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora_train.adapters.fused_experts import expert_targets
from flora_train.adapters.methods import Target, TargetMember
from flora_train.adapters.routed.blocks import with_blocks
from flora_train.adapters.routed.first_layer import with_first_layer
from flora_train.adapters.spec import AdapterSpec, Gate
from flora_train.adapters.target_groups import GROUPS, QUERY_KEY, query_key_layers
from flora_train.adapters.target_limits import limited
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.name_patterns import SELECTIONS, ends_with, is_regex, matches_ending
from flora_train.models.encoders import head_names

WITHOUT_LIST = ("all-linear", "default")
"""Values of target_modules that stand alone."""
SPEECH = ("whisper", "speech_to_text", "moonshine")
LIKE_BERT = (
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
LIKE_LLAMA = ("cohere", "cohere2", "granite", "olmo", "olmo2", "olmo3", "smollm3", "stablelm")
IA3_BEYOND_PEFT: dict[str, dict[str, tuple[str, ...]]] = {
    "target_modules": {
        "starcoder2": ("k_proj", "v_proj", "mlp.c_proj"),
        "phi3": ("qkv_proj", "down_proj"),
        **dict.fromkeys(LIKE_LLAMA, ("k_proj", "v_proj", "down_proj")),
        **dict.fromkeys(SPEECH, ("k_proj", "v_proj", "fc2")),
        **dict.fromkeys(LIKE_BERT, ("key", "value", "output.dense")),
        "distilbert": ("k_lin", "v_lin", "ffn.lin2"),
        "mpnet": ("attn.k", "attn.v", "output.dense"),
        "albert": ("key", "value", "ffn_output"),
        "modernbert": ("Wqkv", "mlp.Wo"),
    },
    "feedforward_modules": {
        "starcoder2": ("mlp.c_proj",),
        **dict.fromkeys(("phi3", *LIKE_LLAMA), ("down_proj",)),
        **dict.fromkeys(SPEECH, ("fc2",)),
        **dict.fromkeys(LIKE_BERT, ("output.dense",)),
        "distilbert": ("ffn.lin2",),
        "mpnet": ("output.dense",),
        "albert": ("ffn_output",),
        "modernbert": ("mlp.Wo",),
    },
}
"""Keys, values and the feed-forward output (as in the IA3 paper) of architectures that PEFT's table lacks."""


def linear_layers(model: Any) -> dict[str, Target]:
    """Module name -> Target of every layer that adapters support; the output head is excluded, and of an
    encoder everything that makes the outputs of a head from its last states."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    excluded = head_names(model)
    targets = {}
    for name, module in model.named_modules():
        if module is head or name in excluded:
            continue
        if isinstance(module, nn.Linear) or hasattr(module, "W_q"):  # HQQ's layer is not an nn.Linear
            targets[name] = Target(name, module.in_features, module.out_features, transposed=False)
        elif isinstance(module, Conv1D):
            targets[name] = Target(name, module.nx, module.nf, transposed=True)
    return targets


def dense_weight(layer: nn.Module, target: Target) -> Tensor:
    """The frozen weight as [out, in], a view, in whatever layout the layer stores it."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if target.transposed else weight


def find_targets(
    model: nn.Module, spec: AdapterSpec, unusable: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Target]:
    """Module name -> Target for one adapter, and parameter name -> Target for the weights of fused experts.

    unusable: layers that no adapter can be attached to -> the reason (layer_usage.py). Raises UserError when
    a name matches no module, an unsupported module, or only unusable layers.
    """
    if spec.method == "head":
        return {}
    if spec.gate is not None:
        return _layers_of_members(model, spec.gate, unusable)
    key = f"adapters.{spec.family}"
    selected = _select(model, spec, unusable)
    reason = next((reason for name, reason in unusable.items() if name in selected), None)
    selected = {name: target for name, target in selected.items() if name not in unusable}
    if spec.parent_module is not None and selected:
        selected = _below_parent(selected, spec)
    selected |= expert_targets(model, spec, unusable)
    if not selected:
        hint = f"{type(model).__name__} has no linear layer to adapt"
        if reason is not None:
            hint += f" that an adapter can be attached to ({reason})"
        raise user_error(f"{key}.target_modules", spec.target_modules, hint)
    check_patterns(spec, selected)
    if spec.method == "mixlora":
        return with_blocks(model, selected, spec, linear_layers(model))
    if spec.method == "switch":
        return with_first_layer(model, selected, spec, linear_layers(model))
    if spec.method != "ia3":
        return selected
    suffixes = spec.feedforward_modules
    if suffixes is None and set(_entries(spec)) <= {*GROUPS}:
        suffixes = ()
    for suffix in suffixes or ():
        if not any(ends_with(name, [suffix]) for name in selected):
            hint = f"matches none of the targets {', '.join(endings(selected))}"
            raise user_error(f"{key}.feedforward_modules", suffix, hint)
    if suffixes is None:
        suffixes = tuple(_ia3_default(model, "feedforward_modules", key))
    for name, target in selected.items():
        if ends_with(name, suffixes) and not target.experts:
            selected[name] = replace(target, feedforward=True)
    return selected


def _layers_of_members(model: nn.Module, gate: Gate, unusable: Mapping[str, str]) -> dict[str, Target]:
    """The layers that some member of a gate adapts, with these members."""
    members: dict[str, list[TargetMember]] = {}
    for number, member in enumerate(gate.members):
        for name, target in find_targets(model, member, unusable).items():
            members.setdefault(name, []).append(TargetMember(number, target.feedforward))
    return {
        name: replace(target, members=tuple(members[name]))
        for name, target in linear_layers(model).items()
        if name in members
    }


def _select(model: nn.Module, spec: AdapterSpec, unusable: Mapping[str, str]) -> dict[str, Target]:
    """The layers that `target_modules` and its limits select, usable or not."""
    available = linear_layers(model)
    suffixes: list[str] = []
    if spec.target_modules == "all-linear" or (spec.target_modules == "default" and spec.method != "ia3"):
        chosen = {*available}
    elif is_regex(spec.target_modules):
        chosen = _match_regex(model, available, spec)
    elif spec.target_modules == "default":
        suffixes = _ia3_default(model, "target_modules", f"adapters.{spec.family}")
        chosen = _match(model, available, suffixes, key=f"adapters.{spec.family}.target_modules")
    else:
        suffixes = [entry for entry in _entries(spec) if entry not in GROUPS]
        chosen = _match(model, available, suffixes, key=f"adapters.{spec.family}.target_modules")
        if QUERY_KEY in _entries(spec):
            chosen |= _query_and_key(model, available, f"adapters.{spec.family}.target_modules")
    chosen = limited(model, chosen, spec)
    _check_supported(model, chosen, available, spec=spec, suffixes=suffixes)
    selected = {name: target for name, target in available.items() if name in chosen}
    if spec.target_modules != "default":
        _check_usable(model, selected, unusable, spec=spec, suffixes=suffixes)
    return selected


def _check_usable(
    model: nn.Module,
    selected: Collection[str],
    unusable: Mapping[str, str],
    *,
    spec: AdapterSpec,
    suffixes: Iterable[str],
) -> None:
    """Raises UserError for an entry of target_modules that selects unusable layers only."""
    for suffix in suffixes:
        names = [name for name in selected if ends_with(name, [suffix])]
        if names and all(name in unusable for name in names):
            layer = f"{names[0]} of {type(model).__name__}"
            hint = f"no adapter can be attached to {layer}, which {unusable[names[0]]}: remove it"
            raise user_error(f"adapters.{spec.family}.target_modules", suffix, hint)


def _entries(spec: AdapterSpec) -> tuple[str, ...]:
    """`target_modules` as a list, also where it is one word."""
    if isinstance(spec.target_modules, str):
        return (spec.target_modules,)
    return spec.target_modules


def _query_and_key(model: nn.Module, available: Mapping[str, Target], key: str) -> set[str]:
    """The layers of the group query-key. Raises UserError for a model in which none are found."""
    names = query_key_layers(available)
    if not names:
        hint = f"{type(model).__name__} has no layers that are known to compute queries and keys: "
        hint += f"list names in its place, of {choices(endings(available))}"
        raise user_error(key, QUERY_KEY, hint)
    return names


def _below_parent(selected: Mapping[str, Target], spec: AdapterSpec) -> dict[str, Target]:
    """The selected layers below a module that is named `parent_module`. Raises UserError if there are
    none."""
    below = {name: target for name, target in selected.items() if spec.parent_module in name.split(".")[:-1]}
    if not below:
        parts: set[str] = set()
        for name in selected:
            parts.update(part for part in name.split(".")[:-1] if not part.isdigit())
        options = sorted(parts)
        hint = f"no target is below it; they are below {choices(options)}."
        hint += did_you_mean(str(spec.parent_module), options)
        raise user_error(f"adapters.{spec.family}.parent_module", spec.parent_module, hint)
    return below


def endings(names: Iterable[str]) -> list[str]:
    """The distinct last parts of module names."""
    return sorted({name.rpartition(".")[2] for name in names})


def shortest_suffixes(modules: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """The shortest suffixes that select exactly `chosen` among all `modules`, as PEFT reads
    `target_modules`."""
    chosen = set(chosen)
    other_suffixes: set[str] = set()
    for name in modules:
        if name not in chosen:
            other_suffixes.update(_suffixes(name))
    selection = set()
    for name in chosen:
        unique = (suffix for suffix in _suffixes(name) if suffix not in other_suffixes)
        selection.add(next(unique, name))
    return sorted(selection)


def _suffixes(name: str) -> list[str]:
    """The suffixes of a module name that begin at a part of it, shortest first."""
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _match(
    model: nn.Module, available: Mapping[str, Target], suffixes: Sequence[str], *, key: str
) -> set[str]:
    """The modules that end in one of `suffixes`, whatever their type. Raises UserError for a suffix of no
    module."""
    modules = [name for name, _ in model.named_modules()]
    options = endings(available)
    for suffix in suffixes:
        if not any(ends_with(name, [suffix]) for name in modules):
            hint = f"matches no module of {type(model).__name__}; it has {', '.join(options)}."
            if suffix in WITHOUT_LIST:
                hint += f" To select layers by {suffix}, write it without a list."
            raise user_error(key, suffix, hint + did_you_mean(suffix, [*options, *GROUPS]))
    return {name for name in modules if ends_with(name, suffixes)}


def _match_regex(model: nn.Module, available: Mapping[str, Target], spec: AdapterSpec) -> set[str]:
    """The modules whose complete name the regular expression in `target_modules` matches, as in PEFT. Raises
    UserError where there are none."""
    expression = str(spec.target_modules)
    names = {name for name, _ in model.named_modules() if name and re.fullmatch(expression, name)}
    if names:
        return names
    options = endings(available)
    hint = f"is a regular expression that matches the complete name of no module of {type(model).__name__}, "
    hint += f"such as {next(iter(available), 'none')}"
    if any(ends_with(name, [expression]) for name, _ in model.named_modules()):
        hint += f". To select modules by their ending, write a list: [{expression}]"
    elif meant := did_you_mean(expression, [*SELECTIONS, *options]):
        hint += f".{meant}"
    else:
        hint += f"; modules end in {', '.join(options)}"
    raise user_error(f"adapters.{spec.family}.target_modules", expression, hint)


def _check_supported(
    model: nn.Module,
    chosen: Collection[str],
    available: Mapping[str, Target],
    *,
    spec: AdapterSpec,
    suffixes: Sequence[str],
) -> None:
    """Raises UserError for a selected module that is no supported layer."""
    for name, module in model.named_modules():
        if name in chosen and name not in available:
            entry = next((suffix for suffix in suffixes if ends_with(name, [suffix])), spec.target_modules)
            class_name = type(module).__name__
            options = ", ".join(endings(available))
            supported = f"supported are Linear and Conv1D below the output head: {options}"
            hint = f"matches {name}, a {class_name}; {supported}"
            raise user_error(f"adapters.{spec.family}.target_modules", entry, hint)


def check_patterns(spec: AdapterSpec, targets: Collection[str]) -> None:
    """Raises UserError for a key of rank_pattern or alpha_pattern that matches none of the targets."""
    for option, pairs in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for pattern, _ in pairs:
            if not any(matches_ending(pattern, name) for name in targets):
                options = endings(targets)
                hint = f"matches none of the targets, which end in {', '.join(options)}."
                hint += did_you_mean(pattern, options)
                raise user_error(f"adapters.{spec.family}.{option}", pattern, hint)


def _ia3_default(model: nn.Module, option: str, key: str) -> list[str]:
    """PEFT's default, so that an exported adapter has the same meaning in PEFT."""
    from peft.utils import constants

    peft_table = getattr(constants, f"TRANSFORMERS_MODELS_TO_IA3_{option.upper()}_MAPPING")
    table = {**peft_table, **IA3_BEYOND_PEFT[option]}
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if architecture not in table:
        options = ", ".join(endings(linear_layers(model)))
        hint = f"IA3 has no default for architecture {architecture!r}: choose from {options}"
        raise user_error(f"{key}.{option}", None, hint)
    return list(table[architecture])


def check_base(model: nn.Module) -> torch.device:
    """The device of the base model. Raises UserError if it is on several devices (device_map)."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise user_error("model", sorted(map(str, devices)), "the base model must be on one device")
    return devices.pop()
