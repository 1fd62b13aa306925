"""Initialises adapters from PEFT adapters: LORA, IA3, HIRA as fLoRA, and LORA as the fLoRA that fits it
best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_config import PeftConfig, check_harmless
from flora_train.adapters.peft_equivalents import (
    PeftAdapter,
    as_lora,
    flora_as_hira,
    without_zero_ranks,
)
from flora_train.adapters.peft_tensors import (
    MAGNITUDE,
    PREFIX,
    SUFFIXES,
    check_targets,
    check_tensors,
    read_files,
    split_head,
    with_whole_names,
)
from flora_train.adapters.routed.init_from import copy_values, read_source, values_of
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.subtracted_init import WeightOf, find_initial, on_original_base
from flora_train.adapters.targets import dense_weight
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.export.gate_members import ModuleValues, copy_members, gates_among, values_from_peft
from flora_train.export.label_names import read_labels
from flora_train.export.low_rank import modulation, relative_norm
from flora_train.export.peft_format import peft_config
from flora_train.export.peft_forms import BaseModel
from flora_train.kernels.dora.op import adapted_norms
from flora_train.models.hub_files import adapter_folder
from flora_train.runtime.distributed import on_every_process
from flora_train.runtime.progress import ProgressBar
from flora_train.training.fsdp import full_tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@torch.no_grad()
def init_from_peft(bank: AdapterBank, adapters: Iterable[int]) -> None:
    """Copy into each of these adapters the PEFT adapter that its `init_from` names, and into gates the
    adapters that they choose from; others are unchanged.

    Raises UserError with the problems of all adapters (another PEFT type, rank, scale or other layers) before
    any adapter changes. Collective: the base model may be sharded.
    """
    adapters = list(adapters)
    every = [bank.specs[adapter] for adapter in adapters]
    specs = [spec for spec in every if not spec.is_routed]
    routed = on_every_process(
        lambda: _for_each([spec for spec in every if spec.is_routed], partial(_read_routed, bank))
    )
    members = on_every_process(lambda: _read_members(bank, gates_among(bank, adapters)))
    peft_adapters = on_every_process(
        lambda: _for_each(
            [spec for spec in specs if spec.method != "head"],
            lambda spec, source, key: read_peft(source, key),
        )
    )

    heads = on_every_process(lambda: _for_each(specs, _read_head))
    on_base: dict[str, PeftAdapter] = {}

    def converted(spec: AdapterSpec, source: str, key: str) -> Mapping[str, Tensor]:
        if source not in on_base:
            on_base[source] = on_base_of(bank, peft_adapters[spec.name], source, key=key)
        return _parameters(bank, spec.name, on_base[source], source=source, key=key)

    layered = [spec for spec in specs if spec.method != "head"]
    for name, values in _for_each(layered, converted).items():
        for module, params in bank.parameters_of(name).items():
            for param, view in params.items():
                view.copy_(values[f"{module}.{param}"])
    for name, head in heads.items():
        _copy_head(bank, name, head)
    for name, (parameters, own_head) in routed.items():
        copy_values(bank.parameters_of(name), parameters)
        _copy_head(bank, name, own_head)
    _copy_members(bank, gates_among(bank, adapters), members)


def _read_routed(
    bank: AdapterBank, spec: AdapterSpec, source: str, key: str
) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Tensor]]:
    """The parameters that a routed adapter starts with, and its head. Raises UserError where its folder does
    not fit."""
    theirs = read_source(source, key)
    pool, _ = bank.location[bank.id_of(spec.name)]
    return values_of(pool, spec, theirs, key), _matching_head(spec, source, theirs.head, key)


def _read_members(bank: AdapterBank, gates: Iterable[int]) -> dict[str, PeftAdapter]:
    """Source -> the PEFT adapter, of the members of these gates that are not adapters of the bank. Raises
    UserError with all problems."""
    adapters: dict[str, PeftAdapter] = {}
    problems: list[Problem] = []
    for adapter in gates:
        for _, source, key in _sources_of(bank, adapter):
            if source in bank.ids or source in adapters:
                continue
            try:
                adapters[source] = read_peft(source, key)
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return adapters


def _copy_members(bank: AdapterBank, gates: Iterable[int], read: Mapping[str, PeftAdapter]) -> None:
    on_base: dict[str, PeftAdapter] = {}
    for adapter in gates:
        values: dict[str, ModuleValues] = {}
        for member, source, key in _sources_of(bank, adapter):
            if source not in read:
                values[member.name] = bank.parameters_of(source)
                continue
            if source not in on_base:
                on_base[source] = on_base_of(bank, read[source], source, key=key)
            values[member.name] = values_from_peft(bank, adapter, member, on_base[source], key=key)
        copy_members(bank, adapter, values)


def _sources_of(bank: AdapterBank, adapter: int) -> list[tuple[AdapterSpec, str, str]]:
    """(member, its entry in `over`, key) of each member of a gate."""
    spec = bank.specs[adapter]
    assert spec.gate is not None
    return [(member, str(member.init_from), f"adapters.{spec.family}.over") for member in spec.gate.members]


def _copy_head(bank: AdapterBank, name: str, head: Mapping[str, Tensor]) -> None:
    """Copy the head of a PEFT adapter, if the adapter has one of the same shapes; otherwise its head stays as
    it was initialised."""
    views = bank.head_of(name)
    source = bank.specs[bank.id_of(name)].init_from
    if not views or not head:
        return
    if {key: view.shape for key, view in views.items()} != {key: t.shape for key, t in head.items()}:
        logger.warning(f"{name} begins with a new head: that of {source} has other outputs or another form")
        return
    for key, view in views.items():
        view.copy_(head[key])


def _read_head(spec: AdapterSpec, source: str, key: str) -> dict[str, Tensor]:
    """The head of a PEFT adapter; empty where the adapter's own stays as it was initialised.

    Raises UserError for an adapter with a head whose task has no labels, and for method head without one.
    """
    _, _, head = split_head(*read_files(source, key))
    return _matching_head(spec, source, head, key)


def _matching_head(spec: AdapterSpec, source: str, head: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """The head, or an empty one where it has other labels. Raises UserError if the task has no labels."""
    if head and spec.head is None:
        hint = f"has a head (modules_to_save), and tasks.{spec.task} has no labels that one learns"
        raise user_error(key, source, hint)
    if spec.labels is not None and head:
        theirs = read_labels(adapter_folder(source))
        if theirs is not None and theirs.names != spec.labels.labels:
            logger.warning(f"{spec.name} begins with a new head: that of {source} has other labels")
            return {}
    return dict(head)


def _for_each(
    specs: Iterable[AdapterSpec], function: Callable[[AdapterSpec, str, str], Result]
) -> dict[str, Result]:
    """Name -> function(spec, source, key) for every spec with `init_from`. Raises UserError with all
    problems."""
    problems: list[Problem] = []
    results: dict[str, Result] = {}
    for spec in specs:
        if spec.init_from is None:
            continue
        try:
            results[spec.name] = function(spec, spec.init_from, f"adapters.{spec.family}.init_from")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return results


def read_peft(source: str, key: str) -> PeftAdapter:
    """Configuration and tensors of a LORA, IA3 or HIRA, from a folder or the hub.

    FLORA is returned as the equal HIRA, ADALORA as the equal LORA. Raises UserError, naming `key`, for other
    PEFT types and for options and tensors that are not known to be harmless.
    """
    config, tensors, _ = split_head(*read_files(source, key))
    check_harmless(config, source, key)
    check_tensors(config, tensors, source, key=key)
    find_initial(config, source, key)
    peft_type = config.peft_type
    if peft_type == "ADALORA":
        return as_lora(config, tensors)
    if peft_type == "HIRA":
        return without_zero_ranks(config, tensors)
    if peft_type == "FLORA":
        import flora_train.peft_plugin  # noqa: F401  (registers FLORA with peft)

        return flora_as_hira(config, tensors)
    return config, tensors


def _parameters(
    bank: AdapterBank, name: str, peft_adapter: PeftAdapter, *, source: str, key: str
) -> Mapping[str, Tensor]:
    """`<module>.<parameter>` -> the bank's parameter that corresponds to the PEFT adapter's tensors."""
    config, tensors = peft_adapter
    spec = bank.specs[bank.id_of(name)]
    if config.peft_type == "LORA" and spec.method == "flora" and spec.offset:
        return _fitted(bank, name, peft_adapter, source=source, key=key)
    if config.peft_type == "LORA" and spec.method == "dora" and not config.is_dora:
        config, tensors = _as_dora(bank, peft_adapter, source, key=key)
    _check_method(bank, name, config, source=source, key=key)
    expected = _expected_tensors(bank, name)
    check_layers(expected.keys(), tensors.keys(), source, key=key)
    for tensor in expected:
        shape, expected_shape = tuple(tensors[tensor].shape), tuple(expected[tensor].shape)
        if shape != expected_shape:
            hint = (
                f"{tensor} has shape {shape} instead of {expected_shape}: the rank or the base model differs"
            )
            raise user_error(key, source, hint)
    check_targets(config, modules_of(config, tensors), bank.base_names(), source=source, key=key)
    pool, member = bank.location[bank.id_of(name)]
    parameters: dict[str, Tensor] = {}
    for module, target in pool.targets.items():
        prefix = f"{PREFIX}{module}."
        by_suffix = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }
        try:
            spec = pool.specs[member].at(module)
            params = pool.method.from_peft(by_suffix, spec, target.feedforward)
        except ValueError as error:
            raise user_error(key, source, str(error)) from error
        parameters |= {f"{module}.{param}": tensor for param, tensor in params.items()}
    return parameters


def on_base_of(bank: AdapterBank, adapter: PeftAdapter, source: str, *, key: str) -> PeftAdapter:
    """A PiSSA or similar as the LORA of the bank's base model, other adapters unchanged. Raises UserError
    where it does not fit. Collective, if the base model is sharded."""
    initial = find_initial(adapter[0], source, key)
    config, tensors = adapter
    adapter = config, with_whole_names(tensors, modules_of(config, tensors), bank.base_names())
    return on_original_base(adapter, _weights_of(bank, source, key), initial=initial, source=source, key=key)


def _weights_of(bank: AdapterBank, source: str, key: str) -> WeightOf:
    """Module -> its frozen weight [out, in], whole and dense. Raises UserError for a module without
    adapter."""
    targets = {name: target for pool in bank.pools for name, target in pool.targets.items()}

    def weight_of(module: str) -> Tensor:
        if module not in targets:
            raise user_error(
                key, source, f"adapts {module}, where the run has no adapter: remove target_modules"
            )
        layer: Any = bank.model.get_submodule(module)
        with layer.weight_context(torch.float32) as weight:
            return full_tensor(weight)

    return weight_of


def _as_dora(bank: AdapterBank, adapter: PeftAdapter, source: str, *, key: str) -> PeftAdapter:
    """The DoRA that computes what a LORA computes: its magnitudes are the norms of the adapted weights."""
    config, tensors = adapter
    weight_of = _weights_of(bank, source, key)
    magnitudes: dict[str, Tensor] = {}
    for name, A in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        module = stem.removeprefix(PREFIX)
        weight, B = weight_of(module), tensors[f"{stem}.lora_B.weight"]
        if (len(B), A.shape[1]) != tuple(weight.shape):
            hint = f"adapts {module} as {len(B)} x {A.shape[1]}, and here it is {tuple(weight.shape)}: "
            raise user_error(key, source, f"{hint}the base model differs")
        scaling = [config.scale_at(module)]
        factors = A.to(weight.device)[None], B.to(weight.device)[None]
        magnitudes[f"{stem}.{MAGNITUDE}"] = adapted_norms(weight, *factors, scaling)[0]
    return PeftConfig({**config.options, "use_dora": True}), {**tensors, **magnitudes}


def _expected_tensors(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """The tensors of the adapter by PEFT's names, each of its own rank."""
    pool, member = bank.location[bank.id_of(name)]
    expected: dict[str, Tensor] = {}
    for module, params in bank.parameters_of(name).items():
        spec, feedforward = pool.specs[member].at(module), pool.targets[module].feedforward
        by_suffix = pool.method.peft_tensors(params, spec, feedforward)
        expected |= {f"{PREFIX}{module}.{suffix}": tensor for suffix, tensor in by_suffix.items()}
    return expected


def _fitted(
    bank: AdapterBank, name: str, peft_adapter: PeftAdapter, *, source: str, key: str
) -> Mapping[str, Tensor]:
    """The parameters of the residual fLoRA that is fitted to a LORA; logs the error of the fit."""
    config, tensors = peft_adapter
    expected = {f"{PREFIX}{module}.lora_A.weight" for module in bank.parameters_of(name)}
    check_layers(
        expected, {tensor for tensor in tensors if tensor.endswith(".lora_A.weight")}, source, key=key
    )
    check_targets(config, modules_of(config, tensors), bank.base_names(), source=source, key=key)
    parameters, error = fit_lora(bank, name, peft_adapter, key=key)
    rank = bank.specs[bank.id_of(name)].rank
    fit = f"|W0 * (B A) - dW| / |dW| = {error:.3f}"
    logger.info(f"{name} starts as W0 * (1 + B A) of rank {rank} fitted to {source}: {fit}")
    return parameters


@torch.no_grad()
def fit_lora(bank: AdapterBank, name: str, lora: PeftAdapter, *, key: str) -> tuple[dict[str, Tensor], float]:
    """The parameters of a residual fLoRA that adds nearly the same as a LORA, and the error of the fit.

    Returns `<module>.<parameter>` -> tensor, and |W0 * (B A) - dW| / |dW|, Frobenius over all layers. The fit
    is close but not always the closest. A product cannot change a weight that is 0, which the error includes.
    Raises UserError for a LORA of another base model.
    """
    config, tensors = lora
    pool, member = bank.location[bank.id_of(name)]
    parameters: dict[str, Tensor] = {}
    squared_error = squared_norm = 0.0
    with ProgressBar(f"fit {name}", len(pool.targets)) as progress:
        for done, (module, target) in enumerate(pool.targets.items(), start=1):
            layer: Any = bank.model.get_submodule(module)
            weight = full_tensor(dense_weight(layer.base_layer, target)).double()
            lora_A = tensors[f"{PREFIX}{module}.lora_A.weight"].to(weight)
            lora_B = tensors[f"{PREFIX}{module}.lora_B.weight"].to(weight)
            shape = len(lora_B), lora_A.shape[1]
            if shape != tuple(weight.shape):
                hint = f"has shape {tuple(weight.shape)} here and {shape} in the LORA: the base model differs"
                raise user_error(key, module, hint)
            delta = config.scale_at(module) * (lora_B @ lora_A)
            B, A = modulation(weight, delta, pool.specs[member].at(module).rank)
            squared_error += float((weight * (B.double() @ A.double()) - delta).square().sum())
            squared_norm += float(delta.square().sum())
            parameters |= {f"{module}.A": A, f"{module}.B": B}
            progress.update(done)
    return parameters, relative_norm(squared_error, squared_norm)


def check_layers(expected: Collection[str], names: Collection[str], source: str, *, key: str) -> None:
    """Raises UserError where the tensors of a PEFT adapter are not those of the adapter that starts from
    it."""
    lacking, surplus = set(expected) - set(names), set(names) - set(expected)
    hint = "target_modules (and feedforward_modules) must be the same"
    if lacking:
        raise user_error(key, source, f"lacks {len(lacking)} tensors, such as {min(lacking)}: {hint}")
    if surplus:
        raise user_error(key, source, f"has {len(surplus)} more tensors, such as {min(surplus)}: {hint}")


def modules_of(config: PeftConfig, tensors: Collection[str]) -> set[str]:
    """The modules that these tensors adapt."""
    suffix = f".{SUFFIXES[config.peft_type][0]}"
    return {name.removeprefix(PREFIX).removesuffix(suffix) for name in tensors if name.endswith(suffix)}


def _check_method(bank: AdapterBank, name: str, config: PeftConfig, *, source: str, key: str) -> None:
    """Raises UserError where the PEFT adapter has another PEFT type, rank or scale than the bank's
    adapter."""
    expected, spec = peft_config(bank, name, BaseModel("")), bank.specs[bank.id_of(name)]
    peft_type = config.peft_type
    if peft_type != expected["peft_type"]:
        allowed = expected["peft_type"]
        hint = f"has the PEFT type {peft_type}, and an adapter of method {spec.method} starts from {allowed}"
        raise user_error(key, source, hint)
    if config.is_dora != (spec.method == "dora"):
        hint = f"is a DoRA, and an adapter of method {spec.method} cannot start from it: set method to dora"
        raise user_error(key, source, hint)
    more = int(spec.method == "flora" and not spec.offset)
    has_patterns = spec.has_patterns or bool(config.rank_pattern or config.alpha_pattern)
    for module in bank.parameters_of(name):
        own, theirs = spec.at(module), config.rank_at(module)
        if theirs is not None and theirs != own.rank + more:
            hint = f"differs from the rank of {source}"
            option, fix = "rank", f": set it to {theirs - more}"
            if has_patterns:
                option = "rank_pattern"
                fix = f", {theirs - more} on {module}: remove rank and rank_pattern"
            raise user_error(f"adapters.{spec.family}.{option}", own.rank, hint + fix)
        if peft_type == "LORA" and abs(config.scale_at(module) - own.scaling) > 1e-9:
            hint = f"differs from the alpha of {source}"
            option, fix = "alpha", f": set it to {config.alpha:g}, and rslora to {config.rslora}"
            if has_patterns:
                option = "alpha_pattern"
                scale = config.scale_at(module)
                fix = f", which scales {module} by {scale:g}: remove alpha, alpha_pattern and rslora"
            raise user_error(f"adapters.{spec.family}.{option}", own.alpha, hint + fix)
