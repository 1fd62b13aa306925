"""Completes and checks routed adapters that start from a folder (init_from), and the parameters that they
start with."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.methods import METHODS
from flora_train.adapters.methods.routed import ROUTER
from flora_train.adapters.peft_config import PeftConfig
from flora_train.adapters.peft_tensors import PREFIX, suffixes_of, with_whole_names
from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.routed.folder import RoutedAdapter, is_routed_folder, read_routed
from flora_train.adapters.routed.parts import Part, expert_parts
from flora_train.adapters.routed.published import is_published_folder, read_published
from flora_train.adapters.spec import AdapterSpec, make_spec, scaling_of
from flora_train.adapters.targets import shortest_suffixes
from flora_train.config.adapter_schema import DEFAULT_EXPERTS, AdapterConfig
from flora_train.config.errors import user_error
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig

KEYS = ("expert", "experts", "top_k", "top_p", "rank", "alpha", "rslora")
"""Keys of a routed adapter that are read from its folder where a recipe leaves them out."""
SHAPES = ("expert", "experts", "rank")
"""Those that must not differ from the folder's."""

logger = logging.getLogger(__name__)


def read_source(source: str, key: str) -> RoutedAdapter:
    """The routed adapter in a folder, in our layout or in MixLoRA's published one.

    Raises UserError, naming `key`, for another folder, a name on the hub, or damaged files.
    """
    folder = find_file(source)
    if is_routed_folder(folder):
        return read_routed(source, key)
    if is_published_folder(folder):
        return read_published(source, key)
    if folder.exists():
        hint = "is not a routed adapter: it has neither a routing.json nor an adapter_config.json of MIXLORA"
        hint += ": set method to that of the adapter, such as lora, or name another folder"
        raise user_error(key, source, hint)
    hint = "is no folder: a routed adapter starts from a folder; download it first (hf download)"
    raise user_error(key, source, hint)


def resolve_routed(
    config: RunConfig, family: str, adapter: AdapterConfig, model: Callable[[], nn.Module]
) -> AdapterConfig:
    """The entry of a routed adapter with the keys that it leaves out and its folder has.

    model: the base model without weights. Raises UserError where a folder is missing, damaged or does not
    fit.
    """
    key = f"adapters.{family}.init_from"
    routed: dict[str, RoutedAdapter] = {}
    tasks = adapter.tasks or list(config.tasks)
    for task in tasks:
        source = str(adapter.init_from).replace("{task}", task)
        if source not in routed:
            routed[source] = read_source(source, key)
    modules = [name for name, _ in model().named_modules() if name]
    resolved = adapter
    for source, theirs in routed.items():
        if theirs.routing.method != adapter.method:
            hint = f"is of method {theirs.routing.method}, and an adapter of method {adapter.method} starts "
            hint += f"from one of its own method: set method to {theirs.routing.method}"
            raise user_error(key, source, hint)
        facts = _facts(theirs, modules)
        left_out = {name: facts[name] for name in KEYS if getattr(resolved, name) is None}
        if resolved.target_modules == "default":
            left_out["target_modules"] = facts["target_modules"]
        resolved = resolved.model_copy(update=left_out)
        _check_settings(resolved, facts, family, source)
        _check_base(theirs, config, key, model())
        spec = make_spec(tasks[0], family, resolved, default_steps=config.training.steps)
        pools, _ = build_pools(model(), [spec])
        values_of(pools[0], pools[0].specs[0], theirs, key)
    return resolved


def _facts(theirs: RoutedAdapter, modules: list[str]) -> dict[str, Any]:
    """Key of a recipe -> its value in the folder; None for a key that the experts do not have."""
    config, _ = theirs.first
    routing = theirs.routing
    is_lora = routing.expert == "lora"
    adapted: set[str] = set()
    for part_config, tensors in theirs.parts.values():
        whole = with_whole_names(tensors, _modules_of(part_config, tensors), modules)
        adapted |= _modules_of(part_config, whole)
    return {
        "expert": routing.expert,
        "experts": routing.experts,
        "top_k": routing.top_k,
        "top_p": routing.top_p if routing.top_p < 1.0 else None,
        "rank": config.rank,
        "alpha": config.alpha if is_lora else None,
        "rslora": config.rslora if is_lora else None,
        "target_modules": shortest_suffixes(modules, adapted),
    }


def _modules_of(config: PeftConfig, tensors: Mapping[str, Tensor]) -> set[str]:
    """The modules that these tensors adapt."""
    suffix = f".{suffixes_of(config)[0]}"
    return {name.removeprefix(PREFIX).removesuffix(suffix) for name in tensors if name.endswith(suffix)}


def _check_settings(resolved: AdapterConfig, facts: Mapping[str, Any], family: str, source: str) -> None:
    """Raises UserError where the recipe's settings are not those of the folder."""
    for name in SHAPES:
        value = getattr(resolved, name)
        if value != facts[name]:
            hint = f"is not that of {source}: set it to {facts[name]}, or remove this key"
            raise user_error(f"adapters.{family}.{name}", value, hint)
    count = resolved.experts or DEFAULT_EXPERTS
    if resolved.top_k is not None and resolved.top_k > count:
        raise user_error(f"adapters.{family}.top_k", resolved.top_k, f"is more than the {count} experts")
    if resolved.expert == "lora":
        theirs = scaling_of(facts["rank"], facts["alpha"], facts["rslora"])
        if abs(scaling_of(facts["rank"], resolved.alpha or 0.0, bool(resolved.rslora)) - theirs) > 1e-9:
            hint = f"is not that of {source}: set alpha to {facts['alpha']:g} and rslora to "
            hint += f"{str(facts['rslora']).lower()}, or remove both"
            raise user_error(f"adapters.{family}.alpha", resolved.alpha, hint)


def _check_base(theirs: RoutedAdapter, config: RunConfig, key: str, model: Any) -> None:
    """Warns of another base model. Raises UserError for another activation of the experts."""
    base, activation = theirs.routing.base_model_name_or_path, theirs.routing.activation
    if base and PurePath(base).name != PurePath(config.model.path).name:
        logger.warning(
            "%s: %s was trained on the base model %s, and model.path is %s",
            key,
            theirs.source,
            base,
            config.model.path,
        )
    own = activation_of(model)
    if activation is not None and own is not None and activation != own:
        hint = f"has experts with the activation {activation} (act_fn), and that of the base is {own}"
        raise user_error(key, theirs.source, hint)


def activation_of(model: Any) -> str | None:
    """The name of the activation in the feed-forward blocks of a model; None if its configuration does not
    state it."""
    config = getattr(model, "config", None)
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if isinstance(value := getattr(config, name, None), str):
            return value
    return None


def values_of(pool: Pool, spec: AdapterSpec, theirs: RoutedAdapter, key: str) -> dict[str, dict[str, Tensor]]:
    """Module -> parameter -> the values of a routed adapter of this pool.

    Raises UserError where the folder does not fit the adapter.
    """
    values: dict[str, dict[str, Tensor]] = {}
    stacks: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    parts = expert_parts(pool, spec)
    names = {part.name for part in parts}
    if names != set(theirs.parts):
        different = min(names ^ set(theirs.parts))
        hint = f"does not fit: {different} is on one side only; target_modules or experts differ"
        raise user_error(key, theirs.source, hint)
    for part in parts:
        for module, params in _part_values(part, theirs, key).items():
            for param, tensor in params.items():
                if part.expert is None:
                    values.setdefault(module, {})[param] = tensor
                else:
                    stacks[module, param].append(tensor)
    for (module, param), of_experts in stacks.items():
        values.setdefault(module, {})[param] = torch.stack(of_experts)
    _add_routers(pool, theirs, values, key)
    return values


def _part_values(part: Part, theirs: RoutedAdapter, key: str) -> dict[str, dict[str, Tensor]]:
    """Module -> parameter -> tensor of one part. Raises UserError for other layers, shapes or ends."""
    config, tensors = theirs.parts[part.name]
    # those of embeddings are named as the model's body names its modules
    tensors = with_whole_names(tensors, _modules_of(config, tensors), part.targets)
    source = f"{theirs.source} ({part.name})"
    method = METHODS[part.spec.method]
    by_module: dict[str, dict[str, Tensor]] = {module: {} for module in part.targets}
    for name, tensor in tensors.items():
        stem = name.removeprefix(PREFIX)
        module = next((module for module in by_module if stem.startswith(f"{module}.")), None)
        if module is None:
            hint = (
                f"has a tensor {name}, and the adapter has no such layer: target_modules or the base differ"
            )
            raise user_error(key, source, hint)
        by_module[module][stem.removeprefix(f"{module}.")] = tensor
    values: dict[str, dict[str, Tensor]] = {}
    for module, target in part.targets.items():
        if not by_module[module]:
            hint = f"has no tensors for {module}, which target_modules selects: remove target_modules"
            raise user_error(key, source, hint)
        spec = part.spec.at(module)
        try:
            values[module] = dict(method.from_peft(by_module[module], spec, target.feedforward))
        except (ValueError, KeyError) as error:
            raise user_error(key, source, f"does not fit {module}: {error}") from error
        for param, shape in method.shapes(spec, target).items():
            theirs_shape = tuple(values[module][param].shape)
            if theirs_shape != shape:
                hint = f"has {module}.{param} of shape {theirs_shape} instead of {shape}: the base differs"
                raise user_error(key, source, hint)
    return values


def _add_routers(pool: Pool, theirs: RoutedAdapter, values: dict[str, dict[str, Tensor]], key: str) -> None:
    """Add the routers. Raises UserError where they are of other modules or widths."""
    expected = {name: layout[ROUTER][1] for name, layout in pool.layout.items() if ROUTER in layout}
    if set(expected) != set(theirs.routers):
        different = min(set(expected) ^ set(theirs.routers))
        hint = f"does not fit: only one side has a router of {different}"
        raise user_error(key, theirs.source, hint)
    for module, router in theirs.routers.items():
        if tuple(router.shape) != expected[module]:
            hint = f"has a router {tuple(router.shape)} of {module}, instead of {expected[module]}"
            raise user_error(key, theirs.source, f"{hint}: the base model differs")
        values.setdefault(module, {})[ROUTER] = router


def copy_values(
    parameters: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write what `values_of` returns into the parameters of an adapter."""
    for module, params in values.items():
        for param, value in params.items():
            parameters[module][param].copy_(value)
