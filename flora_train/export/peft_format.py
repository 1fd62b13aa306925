"""Writes an adapter as a folder that PeftModel.from_pretrained loads: LORA, IA3, fLoRA as HIRA or under its
own type FLORA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_tensors import PREFIX
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.export.expert_forms import has_experts
from flora_train.export.label_names import labels_content
from flora_train.export.loadability import NO_FORM, loadability_of
from flora_train.export.peft_forms import BaseModel, Form, config_of, names_in_peft, tensors_of
from flora_train.runtime.atomic import disk_errors, temporary_folder
from flora_train.runtime.manifest import BASE_RECORD, LABELS, PEFT_WARNING

if TYPE_CHECKING:
    from flora_train.run_context import RunContext

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(
    bank: AdapterBank,
    name: str,
    folder: Path,
    *,
    base: BaseModel,
    own_type: bool = False,
    always_lora: bool = False,
    replace: bool = True,
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors (float32) into `folder`, both or none. Other
    files stay.

    A pure fLoRA of rank r becomes an equal HiRA of rank r + 1, a residual one a HiRA of rank r. Where plain
    PEFT does not load the result, NOT_FOR_PLAIN_PEFT.txt beside it states the reason.

    base: what adapter_config.json names as the base model, and BASE_RECORD, if its identity is known;
    own_type: write a FLORA of rank r, which needs flora_train.peft_plugin, instead of a HiRA;
    always_lora: write a LORA even where plain PEFT would drop tensors of it and an equal ADALORA would be
    written; replace: overwrite these files. Returns the folder. Raises UserError if they cannot be written.
    """
    if not replace:
        check_new(folder)
    form = _form(bank, name, own_type, always_lora=always_lora)
    pool, _ = bank.location[bank.id_of(name)]
    with temporary_folder(folder) as temporary:
        save_file(_tensors(bank, name, form), temporary / WEIGHTS, {"format": "pt"})
        content = json.dumps(_config(bank, name, base=base, form=form), indent=2) + "\n"
        (temporary / CONFIG).write_text(content, encoding="utf-8")
        if (labels := _spec_of(bank, name).labels) is not None:
            text = json.dumps(labels_content(labels), indent=2, ensure_ascii=False) + "\n"
            (temporary / LABELS).write_text(text, encoding="utf-8")
        if base.identity is not None:
            record = json.dumps({"base": dict(base.identity)}, indent=2) + "\n"
            (temporary / BASE_RECORD).write_text(record, encoding="utf-8")
        problem = (
            NO_FORM if form == "EXPERTS" else loadability_of(bank.model).problem_of(temporary, pool.head)
        )
        if problem is not None:
            (temporary / PEFT_WARNING).write_text(f"{problem.text}\n", encoding="utf-8")
        _move(temporary, folder, replace)
    return folder


def _move(temporary: Path, folder: Path, replace: bool) -> None:
    """Move the new files into `folder`.

    Without `replace`, the rename fails if another process filled the folder in the meantime. If the process
    is killed, the folder holds the old adapter, the new one, or no CONFIG, in which case PEFT finds no
    adapter.
    """
    if not replace or not folder.exists():
        temporary.rename(folder)
        return
    for file in (CONFIG, BASE_RECORD, LABELS, PEFT_WARNING):
        (folder / file).unlink(missing_ok=True)
    for file in (WEIGHTS, BASE_RECORD, LABELS, PEFT_WARNING, CONFIG):
        if (temporary / file).exists():
            (temporary / file).replace(folder / file)


def _spec_of(bank: AdapterBank, name: str) -> AdapterSpec:
    return bank.specs[bank.id_of(name)]


def base_of(context: RunContext) -> BaseModel:
    """The base model that a run was trained on, with the hash of its weights that run.json records."""
    model, identity = context.config.model, None
    recorded = context.folder.facts().base
    if recorded is not None:
        identity = recorded.model_dump()
    return BaseModel(model.path, model.revision, identity)


def check_new(folder: Path, key: str = "out") -> None:
    """Raises UserError unless the folder is empty or does not exist."""
    with disk_errors(folder):
        if folder.is_symlink():
            is_new = False
        elif folder.is_dir():
            is_new = not any(folder.iterdir())
        else:
            is_new = not folder.exists()
    if not is_new:
        raise user_error(key, str(folder), "exists already: choose another folder, or delete it")


def _form(bank: AdapterBank, name: str, own_type: bool, *, always_lora: bool) -> Form:
    pool, _ = bank.location[bank.id_of(name)]
    if has_experts(pool.targets):
        return form_of(bank, name)
    if own_type:
        return "FLORA"
    if always_lora:
        return "own"
    return form_of(bank, name)


def form_of(bank: AdapterBank, name: str) -> Form:
    """The form of the adapter that plain PEFT loads."""
    pool, member = bank.location[bank.id_of(name)]
    return loadability_of(bank.model).written(pool.targets, pool.specs[member], pool.head).form


def peft_config(bank: AdapterBank, name: str, base: BaseModel, *, own_type: bool = False) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return _config(bank, name, base=base, form="FLORA" if own_type else "own")


def peft_tensors(bank: AdapterBank, name: str, *, own_type: bool = False) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names, on the CPU."""
    return _tensors(bank, name, "FLORA" if own_type else "own")


def _config(bank: AdapterBank, name: str, *, base: BaseModel, form: Form) -> dict[str, Any]:
    pool, member = bank.location[bank.id_of(name)]
    spec = pool.specs[member]
    names = bank.base_names()
    return config_of(bank.model, names, pool.targets, spec=spec, base=base, form=form, head=pool.head)


def _tensors(bank: AdapterBank, name: str, form: Form) -> dict[str, Tensor]:
    pool, member = bank.location[bank.id_of(name)]
    tensors = tensors_of(bank.parameters_of(name), pool.targets, pool.specs[member], form=form)
    tensors |= {f"{PREFIX}{parameter}": tensor for parameter, tensor in bank.head_of(name).items()}
    tensors = names_in_peft(tensors, bank.model, pool.specs[member])
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
