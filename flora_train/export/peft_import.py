"""Starts an adapter where a PEFT adapter ended: LORA, IA3, and HIRA as fLoRA, the way back of peft_format.py. A LORA becomes a fLoRA that is close to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.methods.flora import as_hira
from flora_train.adapters.peft_files import (
    ADALORA_EPSILON,
    ANY_KIND,
    PREFIX,
    SOME_LAYERS,
    SUFFIXES,
    check_harmless,
    check_targets,
    check_tensors,
    kind_of,
    read_files,
)
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import dense_weight
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.export.low_rank import modulation
from flora_train.export.peft_format import peft_config, peft_tensors
from flora_train.runtime.distributed import on_every_process
from flora_train.runtime.progress import ProgressBar
from flora_train.training.fsdp import full_tensor

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


@torch.no_grad()
def init_from_peft(bank: AdapterBank, adapters: Iterable[int]) -> None:
    """Give those of these adapters that have `init_from` the numbers of that PEFT adapter. Raises UserError with all that do not fit: another kind,
    rank or scale, other layers; no adapter has changed then. Collective: a base may be divided among processes."""
    specs = [bank.specs[adapter] for adapter in adapters]
    read = on_every_process(lambda: _of_each(specs, lambda spec, source, key: read_peft(source, key)))
    found = _of_each(specs, lambda spec, source, key: _numbers(bank, spec.name, *read[spec.name], source, key))
    for name, numbers in found.items():
        for module, params in bank.parameters_of(name).items():
            for param, view in params.items():
                view.copy_(numbers[f"{module}.{param}"])


def _of_each(specs: Iterable[AdapterSpec], get: Callable[[AdapterSpec, str, str], Found]) -> dict[str, Found]:
    """Name -> what `get` gives for the spec, its source and the source's key, for those that have one. Raises UserError with all problems."""
    problems: list[Problem] = []
    found: dict[str, Found] = {}
    for spec in specs:
        if spec.init_from is not None:
            try:
                found[spec.name] = get(spec, spec.init_from, f"adapters.{spec.family}.init_from")
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def read_peft(source: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a LORA, IA3 or HIRA, from a folder or the hub; FLORA and ADALORA as the HIRA or LORA that computes the same.

    Raises UserError, naming `key`, for any other adapter, and for one with an option or a tensor that is not known to be harmless.
    """
    config, tensors = read_files(source, key)
    check_harmless(config, source, key)
    check_tensors(config, tensors, source, key)
    if kind_of(config) == "FLORA":
        import flora_train.peft_plugin  # noqa: F401  (so that peft knows FLORA)
    return _as_peft_has_it(config, tensors)


def _as_peft_has_it(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """FLORA, our own type, as the HIRA and ADALORA as the LORA that computes the same; others as they are."""
    if kind_of(config) == "ADALORA":
        return _as_lora(config, tensors)
    if kind_of(config) != "FLORA":
        return config, tensors
    found: dict[str, Tensor] = {}
    for name, A in tensors.items():
        if name.endswith("flora_A"):
            stem = name.removesuffix("flora_A")
            numbers = as_hira(A, tensors[f"{stem}flora_B"], float(config["variant"] == "residual"))
            found |= {f"{stem}{suffix}": tensor for suffix, tensor in numbers.items()}
    rank = config["r"] + (config["variant"] == "pure")
    return {**_kept(config), "peft_type": "HIRA", "r": rank, "hira_dropout": config.get("flora_dropout", 0.0)}, found


def _as_lora(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """ADALORA adds alpha / (r + 1e-5) B (E * A), with a number of E for each rank."""
    rank = config["init_r"]
    found: dict[str, Tensor] = {}
    for name, E in tensors.items():
        if name.endswith("lora_E"):
            stem = name.removesuffix("lora_E")
            A = tensors[f"{stem}lora_A"].double() * E.double() * (rank / (rank + ADALORA_EPSILON))
            found |= {f"{stem}lora_A.weight": A.float(), f"{stem}lora_B.weight": tensors[f"{stem}lora_B"]}
    alpha = {"r": rank, "lora_alpha": config["lora_alpha"], "lora_dropout": config.get("lora_dropout", 0.0)}
    return {**_kept(config), "peft_type": "LORA", **alpha}, found


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """What two kinds have in common."""
    return {name: value for name, value in config.items() if name in ANY_KIND or name in SOME_LAYERS}


def scale_of(config: Mapping[str, Any]) -> float:
    """What a LORA multiplies B A by."""
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def _numbers(
    bank: AdapterBank, name: str, config: Mapping[str, Any], theirs: Mapping[str, Tensor], source: str, key: str
) -> Mapping[str, Tensor]:
    """`<module>.<parameter>` -> its numbers, as the bank has them. config, theirs: what PEFT has."""
    spec = bank.specs[bank.id_of(name)]
    if kind_of(config) == "LORA" and spec.method == "flora" and spec.offset:
        check_layers(
            {f"{PREFIX}{module}.lora_A.weight" for module in bank.parameters_of(name)},
            {k for k in theirs if k.endswith(".lora_A.weight")},
            source,
            key,
        )
        check_targets(config, modules_of(config, theirs), bank.base_names(), source, key)
        numbers, error = fit_lora(bank, name, theirs, scale_of(config))
        logger.info(
            f"{name} begins as W0 * (1 + B A) of rank {spec.rank} close to {source}: |W0 * (B A) - dW| / |dW| = {error:.3f}"
        )
        return numbers
    _check_kind(bank, name, config, source, key)
    ours = peft_tensors(bank, name)
    check_layers(ours.keys(), theirs.keys(), source, key)
    for tensor in ours:
        if ours[tensor].shape != theirs[tensor].shape:
            shapes = f"{tuple(theirs[tensor].shape)}, ours {tuple(ours[tensor].shape)}"
            raise user_error(key, source, f"{tensor} has shape {shapes}: rank or base model is another one")
    check_targets(config, modules_of(config, theirs), bank.base_names(), source, key)
    pool, member = bank.location[bank.id_of(name)]
    numbers = {}
    for module in pool.targets:
        prefix = f"{PREFIX}{module}."
        part = {suffix.removeprefix(prefix): tensor for suffix, tensor in theirs.items() if suffix.startswith(prefix)}
        try:
            params = pool.method.from_peft(part, pool.specs[member], pool.targets[module].feedforward)
        except ValueError as error:
            raise user_error(key, source, str(error)) from error
        numbers |= {f"{module}.{param}": tensor for param, tensor in params.items()}
    return numbers


@torch.no_grad()
def fit_lora(bank: AdapterBank, name: str, theirs: Mapping[str, Tensor], scale: float) -> tuple[dict[str, Tensor], float]:
    """A residual fLoRA that adds about what a LORA adds, a close one and not always the closest: `<module>.<parameter>` -> its numbers, and |W0 * (B A) - dW| / |dW|, Frobenius over
    all layers. A weight that is 0 cannot be changed by a product: the error says what is lost."""
    pool, member = bank.location[bank.id_of(name)]
    numbers: dict[str, Tensor] = {}
    lost = total = 0.0
    with ProgressBar(f"fit {name}", len(pool.targets)) as watch:
        for done, (module, target) in enumerate(pool.targets.items(), start=1):
            weight = full_tensor(dense_weight(bank.model.get_submodule(module).base_layer, target)).double()  # type: ignore[arg-type]
            A, B = (theirs[f"{PREFIX}{module}.lora_{side}.weight"].to(weight) for side in "AB")
            if (len(B), A.shape[1]) != tuple(weight.shape):
                raise user_error(
                    "init_from",
                    module,
                    f"has shape {tuple(weight.shape)} here and {(len(B), A.shape[1])} there: another base model",
                )
            delta = scale * (B @ A)
            B, A = modulation(weight, delta, pool.specs[member].rank)
            lost += float((weight * (B.double() @ A.double()) - delta).square().sum())
            total += float(delta.square().sum())
            numbers |= {f"{module}.A": A, f"{module}.B": B}
            watch.update(done)
    return numbers, (lost / total) ** 0.5 if total else 0.0


def check_layers(ours: Collection[str], theirs: Collection[str], source: str, key: str) -> None:
    """Raises UserError where one of them has a tensor that the other lacks."""
    for side, keys in (("lacks", set(ours) - set(theirs)), ("has beside ours", set(theirs) - set(ours))):
        if keys:
            hint = f"{side} {len(keys)} tensors, {min(keys)} for one: target_modules (and feedforward_modules) must be the same"
            raise user_error(key, source, hint)


def modules_of(config: Mapping[str, Any], tensors: Collection[str]) -> set[str]:
    """The modules that these tensors adapt."""
    suffix = f".{SUFFIXES[kind_of(config)][0]}"
    return {name.removeprefix(PREFIX).removesuffix(suffix) for name in tensors if name.endswith(suffix)}


def _check_kind(bank: AdapterBank, name: str, theirs: Mapping[str, Any], source: str, key: str) -> None:
    """Raises UserError where the adapter computes something else than ours."""
    ours, spec = peft_config(bank, name, ""), bank.specs[bank.id_of(name)]
    if kind_of(theirs) != ours["peft_type"]:
        raise user_error(
            key, source, f"is of kind {kind_of(theirs)}, and an adapter of method {spec.method} begins as {ours['peft_type']}"
        )
    if "r" in ours and theirs["r"] != ours["r"]:
        rank = theirs["r"] - (ours["r"] - spec.rank)
        raise user_error(f"adapters.{spec.family}.rank", spec.rank, f"is not that of {source}: set it to {rank}")
    if spec.method == "lora" and abs(scale_of(theirs) - spec.scaling) > 1e-9:
        hint = f"is not that of {source}: set it to {theirs['lora_alpha']:g}, and rslora to {bool(theirs.get('use_rslora'))}"
        raise user_error(f"adapters.{spec.family}.alpha", spec.alpha, hint)
