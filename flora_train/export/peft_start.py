"""How does an adapter begin where a PEFT adapter ended? LORA, IA3, and HIRA as fLoRA: the way back of peft_format.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import Problem, UserError, fail, first_line
from flora_train.config.files import find_file
from flora_train.export.peft_format import peft_config, peft_tensors

NOT_OURS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "lora_bias")
"""Options of PEFT's that change what an adapter computes and that no adapter of ours has."""


@torch.no_grad()
def start_from_peft(bank: AdapterBank, adapters: Iterable[int]) -> None:
    """Give those of these adapters that have `start_from` the numbers of that PEFT adapter. Raises UserError with all that do not fit: another kind,
    rank or scale, other layers; no adapter has changed then."""
    problems: list[Problem] = []
    found: dict[str, dict[str, Tensor]] = {}
    for spec in (bank.specs[adapter] for adapter in adapters):
        if spec.start_from is not None:
            try:
                found[spec.name] = _numbers(bank, spec.name, spec.start_from, f"adapters.{spec.family}.start_from")
            except UserError as error:
                problems += error.problems
    if problems:
        raise UserError(*problems)
    for name, numbers in found.items():
        for module, params in bank.parameters_of(name).items():
            for param, view in params.items():
                view.copy_(numbers[f"{module}.{param}"])


def _numbers(bank: AdapterBank, name: str, source: str, key: str) -> dict[str, Tensor]:
    """`<module>.<parameter>` -> its numbers, as the bank has them."""
    from peft import PeftConfig
    from peft.utils import load_peft_weights

    local = find_file(source)
    place = str(local) if local.exists() else source
    try:
        config = PeftConfig.from_pretrained(place).to_dict()
        theirs = load_peft_weights(place, device="cpu")
    except Exception as error:  # PEFT, safetensors and the hub's client each have their own
        raise fail(key, source, f"is no PEFT adapter, in a folder or on the hub: {first_line(error)}") from error
    _check_kind(bank, name, config, source, key)
    ours = peft_tensors(bank, name)
    for side, keys in (("lacks", ours.keys() - theirs.keys()), ("has beside ours", theirs.keys() - ours.keys())):
        if keys:
            fix = f"{side} {len(keys)} tensors, {min(keys)} for one: target_modules (and feedforward_modules) must be the same"
            raise fail(key, source, fix)
    for tensor in ours:
        if ours[tensor].shape != theirs[tensor].shape:
            shapes = f"{tuple(theirs[tensor].shape)}, ours {tuple(ours[tensor].shape)}"
            raise fail(key, source, f"{tensor} has shape {shapes}: rank or base model is another one")
    pool, member = bank.location[bank.id_of(name)]
    numbers: dict[str, Tensor] = {}
    for module in pool.targets:
        prefix = f"base_model.model.{module}."
        part = {suffix.removeprefix(prefix): tensor for suffix, tensor in theirs.items() if suffix.startswith(prefix)}
        try:
            params = pool.method.from_peft(part, pool.specs[member], pool.targets[module].feedforward)
        except ValueError as error:
            raise fail(key, source, str(error)) from error
        numbers |= {f"{module}.{param}": tensor for param, tensor in params.items()}
    return numbers


def _check_kind(bank: AdapterBank, name: str, theirs: dict[str, Any], source: str, key: str) -> None:
    """Raises UserError where the adapter computes something else than ours."""
    ours, spec = peft_config(bank, name, ""), bank.specs[bank.id_of(name)]
    kind = str(getattr(theirs["peft_type"], "value", theirs["peft_type"]))
    if kind != ours["peft_type"]:
        raise fail(key, source, f"is of kind {kind}, and an adapter of method {spec.method} begins as {ours['peft_type']}")
    if used := [option for option in NOT_OURS if theirs.get(option)]:
        raise fail(key, source, f"uses {used[0]}, which no adapter here has: it cannot be trained on")
    if theirs.get("bias", "none") != "none":
        raise fail(key, source, f"has biases (bias={theirs['bias']!r}), which no adapter here has: it cannot be trained on")
    if "r" in ours and theirs["r"] != ours["r"]:
        rank = theirs["r"] - (ours["r"] - spec.rank)
        raise fail(f"adapters.{spec.family}.rank", spec.rank, f"is not that of {source}: set it to {rank}")
    if spec.method == "lora":
        scale = theirs["lora_alpha"] / (theirs["r"] ** 0.5 if theirs.get("use_rslora") else theirs["r"])
        if abs(scale - spec.scaling) > 1e-9:
            fix = f"is not that of {source}: set it to {theirs['lora_alpha']:g}, and rslora to {bool(theirs.get('use_rslora'))}"
            raise fail(f"adapters.{spec.family}.alpha", spec.alpha, fix)
