"""How does one adapter become a plain model? Its weights folded into a copy of the base."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.targets import dense_weight
from flora_train.config.errors import user_error
from flora_train.runtime.atomic import disk_errors


@torch.no_grad()
def merge_into_base(bank: AdapterBank, name: str) -> nn.Module:
    """Fold one adapter into the bank's model and unwrap every layer. The bank cannot be used afterwards. Raises UserError, with nothing
    changed, where a weight stands in another place of the model, too, which the adapter leaves as it is (a tied embedding)."""
    pool, member = bank.location[bank.id_of(name)]
    device = bank.device
    rows = {
        module: {param: tensor.to(device) for param, tensor in params.items()}
        for module, params in bank.parameters_of(name).items()
    }
    _check_alone(bank.model, rows)
    for module, layer in [(n, m) for n, m in bank.model.named_modules() if isinstance(m, AdapterLinear)]:
        if module in rows:
            target = pool.targets[module]
            weight, bias = dense_weight(layer.base_layer, target), layer.bias
            merged, merged_bias = pool.method.merge(weight, bias, rows[module], pool.specs[member], target.feedforward)
            weight.copy_(merged)
            if bias is not None and merged_bias is not None:
                bias.copy_(merged_bias)
        bank.model.set_submodule(module, layer.base_layer)
    return bank.model


def _check_alone(model: nn.Module, modules: Iterable[str]) -> None:
    places: dict[int, list[str]] = defaultdict(list)
    for name, parent in model.named_modules():
        for part, child in parent.named_children():
            for parameter in child.parameters(recurse=False):
                places[id(parameter)].append(f"{name}.{part}".removesuffix(".base_layer"))
    for module in modules:
        weight = getattr(model.get_submodule(module).base_layer, "weight", None)
        if others := [place for place in places[id(weight)] if place != module]:
            words = f"{module} has its weight together with {others[0]}, which the adapter leaves as it is: export it as peft"
            raise user_error("as", "merged", words)


def save_merged(bank: AdapterBank, name: str, tokenizer: Any, folder: Path, made_of: Mapping[str, Any] | None = None) -> Path:
    """Merge and save as a transformers checkpoint, whole or not at all. Raises UserError if the folder exists.

    made_of: what flora_train.json in the folder says of the model's origin.
    """
    if folder.exists():
        raise user_error("output folder", str(folder), "exists already: choose another")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(folder):
        temporary.mkdir(parents=True)
        try:
            model: Any = merge_into_base(bank, name)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if made_of is not None:
                (temporary / "flora_train.json").write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
