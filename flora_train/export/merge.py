"""Merges one adapter into the base model and saves the result as a plain transformers checkpoint."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.expert_parameters import AdapterExperts, ExpertWeight
from flora_train.adapters.heads import head_model
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import dense_weight
from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonValue
from flora_train.export.label_names import PROBLEM_TYPES
from flora_train.runtime.atomic import temporary_folder


@torch.no_grad()
def merge_into_base(bank: AdapterBank, name: str) -> nn.Module:
    """Merge one adapter into the bank's model and unwrap every layer. The bank cannot be used afterwards.

    Raises UserError, with the model unchanged, where a weight is shared with a module that the adapter does
    not change (such as a tied embedding).
    """
    pool, member = bank.location[bank.id_of(name)]
    spec = pool.specs[member]
    parameters = bank.parameters_of(name)
    _check_not_shared(bank.model, parameters)
    _merge_experts(bank, name)
    for module, layer in [(n, m) for n, m in bank.model.named_modules() if isinstance(m, AdapterLinear)]:
        if module in parameters:
            params = {param: tensor.to(bank.device) for param, tensor in parameters[module].items()}
            target = pool.targets[module]
            weight, bias = dense_weight(layer.base_layer, target), layer.bias
            merged, merged_bias = pool.method.merge(
                weight, bias, params, spec=spec.at(module), feedforward=target.feedforward
            )
            weight.copy_(merged)
            if bias is not None and merged_bias is not None:
                bias.copy_(merged_bias)
        bank.model.set_submodule(module, layer.base_layer)
    return bank.model


def _merge_experts(bank: AdapterBank, name: str) -> None:
    """Merge one adapter into the fused experts that it changes, and unwrap all of them."""
    pool, member = bank.location[bank.id_of(name)]
    parameters = bank.parameters_of(name)
    for module, experts in [(n, m) for n, m in bank.model.named_modules() if isinstance(m, AdapterExperts)]:
        for part in experts.layout.weights:
            target = pool.targets.get(f"{module}.{part}")
            if target is None:
                continue
            params = {param: value.to(bank.device) for param, value in parameters[target.name].items()}
            weights, biases = experts.part(part).weight, experts.part(part).bias
            for e in range(experts.layout.experts):
                bias = None if biases is None else biases[e]
                merged, merged_bias = pool.method.merge(
                    weights[e],
                    bias,
                    {param: value[e] for param, value in params.items()},
                    spec=pool.specs[member].at(target.name),
                    feedforward=target.feedforward,
                )
                weights[e].copy_(merged)
                if bias is not None and merged_bias is not None:
                    bias.copy_(merged_bias)
        bank.model.set_submodule(module, experts.base_layer)


def _check_not_shared(model: nn.Module, modules: Iterable[str]) -> None:
    modules_of_weight: dict[int, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():
        for part, child in parent.named_children():
            for parameter in child.parameters(recurse=False):
                modules_of_weight[id(parameter)].append(f"{name}.{part}".removesuffix(".base_layer"))
    for module in modules:
        layer = model.get_submodule(module)
        if isinstance(layer, ExpertWeight):
            continue
        weight = getattr(layer.base_layer, "weight", None)
        if others := [other for other in modules_of_weight[id(weight)] if other != module]:
            hint = f"{module} shares its weight with {others[0]}, which has no adapter: export it as peft"
            raise user_error("as", "merged", hint)


def _with_head(model: Any, spec: AdapterSpec, head: Mapping[str, Tensor]) -> nn.Module:
    """The model of transformers' class for the adapter's labels, with its head."""
    assert spec.head is not None
    plain: Any = head_model(model, spec.head)
    values = {**model.state_dict(), **head}
    plain.load_state_dict({key: values[key] for key in plain.state_dict()}, assign=True)
    if spec.labels is not None:
        if spec.labels.task_type != "tokens":
            plain.config.problem_type = PROBLEM_TYPES[spec.labels.task_type]
        if spec.labels.labels:
            plain.config.id2label = dict(enumerate(spec.labels.labels))
            plain.config.label2id = {label: number for number, label in enumerate(spec.labels.labels)}
    return plain


def save_merged(
    bank: AdapterBank,
    name: str,
    folder: Path,
    *,
    preprocessors: Sequence[Any],
    origin: Mapping[str, JsonValue] | None = None,
) -> Path:
    """Merge and save as a transformers checkpoint, complete or not at all.

    preprocessors: saved beside the model: the tokenizer and, of a speech model, its feature extractor and
    processor; origin: content of flora_train.json in the folder. Returns the folder. Raises UserError if it
    exists.
    """
    if folder.exists():
        raise user_error("output folder", str(folder), "exists already: choose another folder")
    with temporary_folder(folder) as temporary:
        head = {name: tensor.clone() for name, tensor in bank.head_of(name).items()}
        model: Any = merge_into_base(bank, name)
        if head:
            model = _with_head(model, bank.specs[bank.id_of(name)], head)
        model.save_pretrained(temporary)
        for preprocessor in preprocessors:
            preprocessor.save_pretrained(temporary)
        if origin is not None:
            (temporary / "flora_train.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        temporary.rename(folder)
    return folder
