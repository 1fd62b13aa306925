"""The published layout of MixLoRA (TUDB-Labs, package mixlora 0.2.3): the names of its files and tensors.

The package reads `adapter_config.json` and `adapter_model.bin`. It adapts every layer of the model alike, and
wants an activation by name: where act_fn is missing, its experts have none.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_train.adapters.peft_config import CONFIG, PeftConfig, check_harmless
from flora_train.adapters.peft_equivalents import PeftAdapter
from flora_train.adapters.peft_tensors import PREFIX, check_tensors
from flora_train.adapters.routed.expert_names import SHARED, expert_name
from flora_train.adapters.routed.folder import RoutedAdapter, RoutingFile, check_routed
from flora_train.config.errors import first_line, user_error
from flora_train.config.json_format import JsonObject, parse_object
from flora_train.config.paths import find_file

PEFT_TYPE = "MIXLORA"
WEIGHTS = "adapter_model.bin"
LAYERS = "model.layers"
"""The list of layers in every base model that the package adapts."""
MODEL_TYPES = ("llama", "gemma", "gemma2", "qwen2", "mistral", "phi", "phi3")
"""Types of base models that the package adapts."""
MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "dense",
    "fc1",
    "fc2",
)
"""Modules that the package adapts."""
GATE = re.compile(r"mixlora\.layers\.(\d+)\.mlp\.moe_gate\.weight")
OF_EXPERT = re.compile(r"mixlora\.layers\.(\d+)\.mlp\.(\w+)\.experts\.(\d+)\.(lora_[AB]\.weight)")
OF_ATTENTION = re.compile(r"mixlora\.layers\.(\d+)\.self_attn\.(\w+)\.(lora_[AB]\.weight)")


def is_published_folder(folder: Path) -> bool:
    """Whether a folder holds a MixLoRA in the published layout."""
    try:
        return parse_object((folder / CONFIG).read_bytes()).get("peft_type") == PEFT_TYPE
    except (OSError, ValueError):
        return False


def gate_name(layer: str) -> str:
    """The published name of a layer's router."""
    return f"mixlora.layers.{layer}.mlp.moe_gate.weight"


def tensor_name(module: str, suffix: str, expert: int | None) -> str | None:
    """The published name of a tensor of a module; None for a module that the package does not adapt.

    module: such as `model.layers.0.mlp.up_proj`; suffix: `lora_A.weight` or `lora_B.weight`; expert: None for
    a layer without experts.
    """
    part = "self_attn" if expert is None else "mlp"
    match = re.fullmatch(rf"{re.escape(LAYERS)}\.(\d+)\.{part}\.(\w+)", module)
    if match is None or match[2] not in MODULES:
        return None
    of_expert = "" if expert is None else f".experts.{expert}"
    return f"mixlora.layers.{match[1]}.{part}.{match[2]}{of_expert}.{suffix}"


def read_published(source: str, key: str) -> RoutedAdapter:
    """The MixLoRA in a folder of the published layout. Raises UserError, naming `key`, where a file is
    missing or damaged, or has options that no adapter here has."""
    folder = find_file(source)
    config = parse_object((folder / CONFIG).read_bytes())
    _check_options(config, source, key)
    try:
        tensors: Any = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        values = {str(name): tensor.float() for name, tensor in dict(tensors).items()}
    except Exception as error:  # pickle, torch and the system each raise their own types
        hint = f"is damaged: {WEIGHTS} cannot be read: {first_line(error)}"
        raise user_error(key, source, hint) from error
    routers, by_part = _sorted_tensors(values, source, key)
    parts = {name: (_part_config(config), part) for name, part in by_part.items()}
    routing = _routing(config, routers, SHARED in parts, source=source, key=key)
    for expert in range(routing.experts):
        if expert_name(expert) not in parts:
            raise user_error(key, source, f"is damaged: {WEIGHTS} has no tensors of expert {expert}")
    adapter = RoutedAdapter(source, routing, parts, routers)
    _check_parts(parts, source, key)
    check_routed(adapter, key)
    return adapter


def _check_options(config: Mapping[str, Any], source: str, key: str) -> None:
    """Raises UserError for options with which the tensors alone do not define what is computed."""
    strategy = config.get("routing_strategy")
    if strategy != "mixlora":
        raise user_error(key, source, f"has routing_strategy {strategy!r}: only mixlora can be read")
    if config.get("use_dora"):
        raise user_error(key, source, "has experts of DoRA (use_dora): experts are lora, flora or ia3")
    expert: Any = config.get("expert_lora") or {}
    different = [
        name for name in ("r", "lora_alpha") if expert.get(name, config.get(name)) != config.get(name)
    ]
    if different:
        hint = f"has experts (expert_lora) of another {different[0]} than its attention adapters"
        raise user_error(key, source, f"{hint}: one adapter here has one rank and one alpha")


def _routing(
    config: Mapping[str, Any], routers: Mapping[str, Tensor], shared: bool, *, source: str, key: str
) -> RoutingFile:
    try:
        return RoutingFile(
            format=1,
            method="mixlora",
            base_model_name_or_path=str(config.get("base_model_name_or_path") or ""),
            expert="lora",
            experts=config["num_experts"],
            top_k=config.get("top_k", 2),
            shared=shared,
            blocks=list(routers),
            activation=config.get("act_fn"),
        )
    except (KeyError, ValueError) as error:
        raise user_error(key, source, f"is damaged: {CONFIG}: {first_line(error)}") from error


def _part_config(config: Mapping[str, Any]) -> PeftConfig:
    """The LORA that an expert, or the layers without experts, are."""
    options: JsonObject = {"peft_type": "LORA", "bias": "none", "use_rslora": bool(config.get("use_rslora"))}
    for name in ("r", "lora_alpha", "lora_dropout", "base_model_name_or_path"):
        if name in config:
            options[name] = config[name]
    return PeftConfig(options)


def _sorted_tensors(
    tensors: Mapping[str, Tensor], source: str, key: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The routers by module, and the tensors of each part by PEFT's names."""
    routers: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := GATE.fullmatch(name):
            routers[f"{LAYERS}.{match[1]}.mlp"] = tensor
        elif match := OF_EXPERT.fullmatch(name):
            layer, module, expert, suffix = match.groups()
            parts[expert_name(int(expert))][f"{PREFIX}{LAYERS}.{layer}.mlp.{module}.{suffix}"] = tensor
        elif match := OF_ATTENTION.fullmatch(name):
            layer, module, suffix = match.groups()
            parts[SHARED][f"{PREFIX}{LAYERS}.{layer}.self_attn.{module}.{suffix}"] = tensor
        else:
            raise user_error(key, source, f"holds {name}, which is not a tensor of a MixLoRA")
        if not bool(torch.isfinite(tensor).all()):
            raise user_error(key, source, f"is damaged: {name} holds numbers that are not finite")
    return routers, dict(parts)


def _check_parts(parts: Mapping[str, PeftAdapter], source: str, key: str) -> None:
    for config, tensors in parts.values():
        check_harmless(config, source, key)
        check_tensors(config, tensors, source, key=key)
