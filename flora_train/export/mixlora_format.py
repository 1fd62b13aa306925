"""Writes a routed adapter in the published layout of MixLoRA, which package mixlora 0.2.3 loads."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_config import CONFIG
from flora_train.adapters.routed.init_from import activation_of
from flora_train.adapters.routed.parts import Part, expert_parts, routers_of
from flora_train.adapters.routed.published import (
    LAYERS,
    MODEL_TYPES,
    MODULES,
    PEFT_TYPE,
    WEIGHTS,
    gate_name,
    tensor_name,
)
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.export.peft_format import check_new
from flora_train.export.peft_forms import BaseModel
from flora_train.runtime.atomic import temporary_folder
from flora_train.runtime.manifest import BASE_RECORD

AS_MIXLORA = "--as mixlora"
NO_DROPOUT = 1e-9
"""Is written as lora_dropout: package mixlora wants more than 0, and drops out inputs of its experts whenever
it computes."""


def check_settings(spec: AdapterSpec) -> None:
    """Raises UserError for an adapter that the published layout cannot hold, as far as its settings show."""
    if spec.method != "mixlora" or spec.experts is None:
        hint = f"is {spec.method}: {AS_MIXLORA} writes adapters of method mixlora; --as peft writes all"
        raise user_error("adapter", spec.name, hint)
    reason = None
    if spec.experts.method != "lora":
        reason = f"experts of {spec.experts.method}, and MixLoRA's layout has experts of lora only"
    elif spec.experts.top_p < 1.0:
        reason = f"top_p {spec.experts.top_p:g}, which MixLoRA's layout lacks"
    elif spec.alpha != int(spec.alpha):
        reason = f"alpha {spec.alpha:g}, and package mixlora takes whole numbers only"
    elif spec.head is not None or spec.pooling is not None:
        reason = "outputs of its own, and MixLoRA's layout is for language models"
    if reason is not None:
        raise user_error("adapter", spec.name, f"has {reason}: --as peft writes all")


def check_layers(bank: AdapterBank, name: str) -> None:
    """Raises UserError for an adapter whose base model or layers the published layout cannot hold."""
    model: Any = bank.model
    model_type = str(model.config.model_type)
    if model_type not in MODEL_TYPES:
        hint = f"has a base of type {model_type}, and package mixlora adapts {', '.join(MODEL_TYPES)} only"
        raise user_error("adapter", name, hint)
    pool, member = bank.location[bank.id_of(name)]
    layers = {str(number) for number in range(model.config.num_hidden_layers)}
    adapted: dict[str, set[str]] = defaultdict(set)
    for part in expert_parts(pool, pool.specs[member]):
        for module in part.targets:
            if tensor_name(module, "lora_A.weight", part.expert) is None:
                hint = f"adapts {module}, which package mixlora does not: {AS_MIXLORA} cannot hold it"
                raise user_error("adapter", name, hint)
            layer = module.removeprefix(f"{LAYERS}.").partition(".")[0]
            adapted[module.rpartition(".")[2]].add(layer)
    partly = next((leaf for leaf, of_leaf in sorted(adapted.items()) if of_leaf != layers), None)
    if partly is not None:
        hint = f"adapts {partly} in some layers only, and package mixlora adapts all alike"
        raise user_error("adapter", name, hint)


def export_mixlora(
    bank: AdapterBank, name: str, folder: Path, *, base: BaseModel, replace: bool = True
) -> Path:
    """Write adapter_config.json and adapter_model.bin (float32) into `folder`, both or none.

    base: the base model that adapter_config.json names; replace: overwrite files of an earlier export.
    Returns the folder. Raises UserError for an adapter that the layout cannot hold, and if files cannot be
    written.
    """
    pool, member = bank.location[bank.id_of(name)]
    spec = pool.specs[member]
    check_settings(spec)
    check_layers(bank, name)
    if not replace:
        check_new(folder)
    parts = expert_parts(pool, spec)
    tensors = _tensors(bank, name, parts)
    config = _config(bank.model, spec, parts, base)
    with temporary_folder(folder) as temporary:
        torch.save(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if base.identity is not None:
            record = json.dumps({"base": dict(base.identity)}, indent=2) + "\n"
            (temporary / BASE_RECORD).write_text(record, encoding="utf-8")
        if not replace or not folder.exists():
            temporary.rename(folder)
            return folder
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / BASE_RECORD).unlink(missing_ok=True)
        for file in (WEIGHTS, BASE_RECORD, CONFIG):
            if (temporary / file).exists():
                (temporary / file).replace(folder / file)
    return folder


def _tensors(bank: AdapterBank, name: str, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Published name -> tensor, on the CPU."""
    parameters = bank.parameters_of(name)
    tensors: dict[str, Tensor] = {}
    for module, router in routers_of(parameters).items():
        layer = module.removeprefix(f"{LAYERS}.").partition(".")[0]
        tensors[gate_name(layer)] = router
    for part in parts:
        for module, params in part.parameters(parameters).items():
            for param in ("A", "B"):
                published = tensor_name(module, f"lora_{param}.weight", part.expert)
                assert published is not None, "check_layers refuses it"
                tensors[published] = params[param]
    # clones, because torch.save would write the whole memory behind a view
    return {key: tensor.detach().float().cpu().clone() for key, tensor in tensors.items()}


def _config(model: Any, spec: AdapterSpec, parts: Sequence[Part], base: BaseModel) -> dict[str, Any]:
    """The content of adapter_config.json.

    jitter_noise is 0 and lora_dropout next to 0, because the package applies both whenever it computes, also
    when it generates.
    """
    assert spec.experts is not None
    adapted = {module.rpartition(".")[2] for part in parts for module in part.targets}
    config: dict[str, Any] = {
        "bias": "none",
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.path,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha),
        "lora_dropout": NO_DROPOUT,
        "target_modules": {leaf: leaf in adapted for leaf in MODULES if leaf in adapted},
        "routing_strategy": "mixlora",
        "num_experts": spec.experts.count,
        "act_fn": activation_of(model),
        "top_k": spec.experts.top_k,
        "router_aux_loss_coef": float(spec.experts.balance_loss),
        "jitter_noise": 0.0,
    }
    if spec.rslora:
        config["use_rslora"] = True
    return config
