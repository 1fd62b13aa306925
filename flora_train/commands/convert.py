"""flora-train convert: writes a fLoRA W0 * (1 + B A) that is close to a LoRA that anybody trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_tensors import check_targets, read_files, split_head
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.base import ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.config.terminal_text import print_plain
from flora_train.export.model_card import in_code, write_card
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import fit_lora, modules_of, on_base_of, read_peft
from flora_train.models.loading import load_base_model
from flora_train.runtime.atomic import check_writable
from flora_train.runtime.environment import default_device


class ConvertOptions(ConfigModel):
    adapter: PathText
    """A LoRA in PEFT's format: a folder, or a name on the hub."""
    out: PathText
    """Folder of the new adapter (PEFT: HIRA)."""
    model: PathText | None = None
    """The base model. Default: the one that the adapter names."""
    rank: int = Field(8, ge=1, le=8192)
    """Of the fLoRA."""


def convert_adapter(adapter: str, *, out: str, rank: int = 8, model: str | None = None) -> None:
    """Write a fLoRA that is close to a LoRA, and print how close. Raises UserError before anything is
    written."""
    options = read_options(ConvertOptions, {"adapter": adapter, "out": out, "rank": rank, "model": model})
    source, folder = options.adapter, Path(options.out)
    if folder.exists():
        raise user_error("out", str(folder), "exists already: choose another, or delete it")
    check_writable(folder)
    config, tensors = read_peft(source, "adapter")
    _, _, head = split_head(*read_files(source, "adapter"))
    if head:
        hint = "has a head: adapters of language models are converted; use adapters.NAME.init_from"
        raise user_error("adapter", source, hint)
    peft_type = config.peft_type
    if peft_type != "LORA":
        advice = "HIRA and IA3 need no conversion, use adapters.NAME.init_from"
        hint = f"is of kind {peft_type}: LORA is converted; {advice}"
        raise user_error("adapter", source, hint)
    if config.is_dora:
        hint = "is a DoRA: LORA is converted; train it on with method dora, use adapters.NAME.init_from"
        raise user_error("adapter", source, hint)
    base = options.model or config.base_model
    if not base:
        raise user_error(
            "model", None, f"{source} names no base model: give --model, a folder or a name on the hub"
        )
    device = default_device()
    base_model = load_base_model(ModelConfig(path=base, dtype="float32"), device)
    modules = sorted(modules_of(config, tensors))
    check_targets(
        config, modules, [name for name, _ in base_model.named_modules()], source=source, key="adapter"
    )
    spec = make_spec(
        "",
        "flora",
        AdapterConfig(method="flora", rank=options.rank, lr=1.0, target_modules=modules),
        default_steps=1,
    )
    bank = AdapterBank.attach(base_model, [replace(spec, name=folder.name)])
    lora = on_base_of(bank, (config, tensors), source, key="adapter")
    numbers, error = fit_lora(bank, folder.name, lora, key="adapter")
    for module, params in bank.parameters_of(folder.name).items():
        for param, view in params.items():
            view.copy_(numbers[f"{module}.{param}"])
    export_peft(bank, folder.name, folder, base=BaseModel(base), replace=False)
    closeness = f"|W0 * (B A) - dW| / |dW| = {error:.3f} over {len(modules)} layers"
    fit = f"of rank {config.rank} by weighted least squares, a close fit and not always the closest"
    origin = f"Fitted to the LoRA `{in_code(source)}` {fit}: {closeness}."
    write_card(None, bank.specs[0], folder, origin=origin)
    print_plain(f"{folder}: fLoRA of rank {options.rank}, {closeness}")
    settings = f"{{method: flora, rank: {options.rank}, lr: 2.0e-2, init_from: {folder}}}"
    print_plain(f"next  train it on with adapters.flora={settings}")
