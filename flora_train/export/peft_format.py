"""Writes an adapter as a folder that `PeftModel.from_pretrained` loads: LORA, IA3, and fLoRA as HIRA, or under a type of its own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import user_error
from flora_train.export.loadability import loadability_of
from flora_train.export.peft_forms import Form, config_of, tensors_of
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.manifest import PEFT_WARNING

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(
    bank: AdapterBank,
    name: str,
    folder: Path,
    base_model: str,
    own_type: bool = False,
    always_lora: bool = False,
    replace: bool = True,
) -> Path:
    """Write `folder`/adapter_config.json and adapter_model.safetensors (float32), whole or not at all. Other files in it stay.

    A pure fLoRA of rank r becomes HiRA of rank r + 1 (exactly), a residual one HiRA of rank r. own_type: it becomes FLORA of rank r, which
    peft knows once flora_train.peft_plugin is imported. A LoRA is an ADALORA of the same numbers where plain PEFT would leave tensors of a
    LORA out; always_lora: it is a LORA there, too. Where plain PEFT does not load what is written, a file NOT_FOR_PLAIN_PEFT.txt says why.
    replace: whether these files may be there already. Raises UserError if they cannot be written.
    """
    if not replace:
        check_new(folder)
    form = "FLORA" if own_type else "own" if always_lora else form_of(bank, name)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(folder):
        temporary.mkdir(parents=True)
        try:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _tensors(bank, name, form).items()}
            save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
            content = json.dumps(_config(bank, name, base_model, form), indent=2) + "\n"
            (temporary / CONFIG).write_text(content, encoding="utf-8")
            if (problem := loadability_of(bank.model).problem_of(temporary)) is not None:
                (temporary / PEFT_WARNING).write_text(f"{problem.text}\n", encoding="utf-8")
            _move(temporary, folder, replace)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _move(temporary: Path, folder: Path, replace: bool) -> None:
    """Put the new files into `folder`. Without `replace` the system refuses a folder that another process has filled meanwhile. A kill leaves the old adapter, the new one, or a folder without CONFIG, which is no adapter."""
    if not replace or not folder.exists():
        temporary.rename(folder)
        return
    for file in (CONFIG, PEFT_WARNING):
        (folder / file).unlink(missing_ok=True)
    for file in (WEIGHTS, PEFT_WARNING, CONFIG):
        if (temporary / file).exists():
            (temporary / file).replace(folder / file)


def check_new(folder: Path, key: str = "out") -> None:
    """Raises UserError if the folder holds anything."""
    with disk_errors(folder):
        if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
            raise user_error(key, str(folder), "exists already: choose another, or delete it")


def form_of(bank: AdapterBank, name: str) -> Form:
    """What the adapter is written as, so that plain PEFT loads it."""
    pool, member = bank.location[bank.id_of(name)]
    return loadability_of(bank.model).written(pool.targets, pool.specs[member]).form


def peft_config(bank: AdapterBank, name: str, base_model: str, own_type: bool = False) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return _config(bank, name, base_model, "FLORA" if own_type else "own")


def peft_tensors(bank: AdapterBank, name: str, own_type: bool = False) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names."""
    tensors = _tensors(bank, name, "FLORA" if own_type else "own")
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _config(bank: AdapterBank, name: str, base_model: str, form: Form) -> dict[str, Any]:
    pool, member = bank.location[bank.id_of(name)]
    return config_of(bank.model, bank.base_names(), pool.targets, pool.specs[member], base_model, form)


def _tensors(bank: AdapterBank, name: str, form: Form) -> dict[str, Tensor]:
    pool, member = bank.location[bank.id_of(name)]
    return tensors_of(bank.parameters_of(name), pool.targets, pool.specs[member], form)
