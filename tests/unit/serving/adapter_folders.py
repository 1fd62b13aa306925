"""Adapter folders for tests of serving, saved by PEFT or by this package, and changes to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from tests.architectures import tiny_model
from tests.conftest import spec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def saved_by_peft(config: Any, folder: Path, *, architecture: str = "llama") -> Path:
    """An adapter of random numbers, saved by PEFT."""
    model = get_peft_model(tiny_model(architecture), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def exported(folder: Path, method: str, *, own_type: bool = False, **options: Any) -> Path:
    """An adapter of random numbers, exported from a bank."""
    settings = spec(method, **options)
    bank = AdapterBank.attach(tiny_model(), [settings])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for params in bank.parameters_of(settings.name).values():
            for view in params.values():
                view += 0.3 * torch.randn(view.shape, generator=generator)
    return export_peft(bank, settings.name, folder, base=BaseModel("base"), own_type=own_type)


def loaded_by_peft(folder: Path, architecture: str = "llama") -> nn.Module:
    """The tiny model with the adapter, in float64."""
    from peft import PeftModel

    import flora_train.peft_plugin  # noqa: F401  (registers FLORA with peft)

    model = tiny_model(architecture, torch.float64)
    return PeftModel.from_pretrained(model, folder).eval()


def change_config(folder: Path, **options: Any) -> None:
    """Set keys of adapter_config.json."""
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]) -> None:
    """Write what `change` makes of the tensors; it may change the mapping in place."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / WEIGHTS)
