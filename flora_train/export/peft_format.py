"""How does an adapter become a folder that `PeftModel.from_pretrained` loads? LORA, IA3, and fLoRA as HIRA, or under a type of its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.targets import shortest_suffixes
from flora_train.atomic import disk_errors
from flora_train.config.errors import fail

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(
    bank: AdapterBank, name: str, folder: Path, base_model: str, own_type: bool = False, replace: bool = True
) -> Path:
    """Write `folder`/adapter_config.json and adapter_model.safetensors (float32), whole or not at all. Other files in it stay.

    A pure fLoRA of rank r becomes HiRA of rank r + 1 (exactly), a residual one HiRA of rank r. own_type: it becomes FLORA of rank r, which
    peft knows once flora_train.peft_plugin is imported. replace: whether these two files may be there already.
    Raises UserError if they cannot be written.
    """
    if not replace:
        check_new(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(folder):
        temporary.mkdir(parents=True)
        try:
            save_file(peft_tensors(bank, name, own_type), temporary / WEIGHTS, {"format": "pt"})
            content = json.dumps(peft_config(bank, name, base_model, own_type), indent=2) + "\n"
            (temporary / CONFIG).write_text(content, encoding="utf-8")
            _move(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _move(temporary: Path, folder: Path) -> None:
    """Put the two files into `folder`. A kill leaves the old adapter, the new one, or a folder without CONFIG, which is no adapter."""
    if not folder.exists():
        temporary.rename(folder)
        return
    (folder / CONFIG).unlink(missing_ok=True)
    for file in (WEIGHTS, CONFIG):
        (temporary / file).replace(folder / file)


def check_new(folder: Path, key: str = "out") -> None:
    """Raises UserError if the folder holds anything."""
    with disk_errors(folder):
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
            raise fail(key, str(folder), "exists already: choose another, or delete it")


def peft_config(bank: AdapterBank, name: str, base_model: str, own_type: bool = False) -> dict[str, Any]:
    """The content of adapter_config.json."""
    pool, member = bank.location[bank.id_of(name)]
    # Apart, because PEFT wants its feedforward_modules to be some of its target_modules, word by word.
    inputs, outputs = (
        shortest_suffixes(
            bank.base_names(), [target.name for target in pool.targets.values() if target.feedforward is feedforward]
        )
        for feedforward in (True, False)
    )
    spec, targets = pool.specs[member], sorted([*outputs, *inputs])
    own = {"peft_type": "FLORA", "r": spec.rank, "variant": "residual" if spec.offset else "pure", "target_modules": targets}
    return {
        **(own if own_type else pool.method.peft_config(spec, targets, inputs)),
        "base_model_name_or_path": base_model,
        "task_type": _task_type(bank.model),
        "inference_mode": True,
        "fan_in_fan_out": any(target.transposed for target in pool.targets.values()),
    }


def peft_tensors(bank: AdapterBank, name: str, own_type: bool = False) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names."""
    pool, member = bank.location[bank.id_of(name)]
    own = {"A": "flora_A", "B": "flora_B"}
    return {
        f"base_model.model.{module}.{suffix}": tensor.detach().cpu().contiguous()
        for module, params in bank.parameters_of(name).items()
        for suffix, tensor in (
            {own[side]: tensor for side, tensor in params.items()}
            if own_type
            else pool.method.peft_tensors(params, pool.specs[member], pool.targets[module].feedforward)
        ).items()
    }


def _task_type(model: Any) -> str | None:
    """PEFT's word for the kind of model. None for speech: PEFT would hand `input_ids` to a model that has no such input."""
    if model.main_input_name != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
