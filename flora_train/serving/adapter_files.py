"""Reads adapter folders for serving: fLoRA and IA3 as multipliers of the base's layers, LoRA as checked
files.

Whatever could not be served exactly raises UserError with the reason. Nothing here needs the base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flora_train.adapters.peft_config import PeftConfig, check_harmless, read_config
from flora_train.adapters.peft_equivalents import PeftAdapter, as_lora
from flora_train.adapters.peft_tensors import PREFIX, SUFFIXES, WEIGHTS, check_tensors, read_files
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.serving.lora_folders import BASE_EMBEDDINGS, LayerShapes, check_lora
from flora_train.serving.multipliers import MultiplicativeAdapter, Multiplier

KEY = "adapter"
"""What a UserError of this module names."""
MOST_BYTES = 16 * 2**30
"""Size limit of an adapter's tensors. A LoRA of rank 256 on all layers of a model of 70e9 parameters has
13 GiB in float32."""

DORA = (
    "is a DoRA, which vLLM does not compute: serve it as a model of its own (flora-train export --as merged)"
)


@dataclass(frozen=True)
class LoraFolder:
    """A LORA, which vLLM reads itself, or an ADALORA, which it reads after `converted` was written."""

    folder: Path
    layers: Mapping[str, LayerShapes]
    """Name of a module, as transformers names it -> inputs, outputs and rank. Without layers of experts."""
    converted: PeftAdapter | None = None
    """Configuration and tensors of the equal LORA, if the folder holds another type."""

    @property
    def rank(self) -> int:
        """The largest rank of a layer, 0 if the adapter has layers of experts only."""
        return max((layer.rank for layer in self.layers.values()), default=0)


def read_adapter(folder: str | Path, shown: str | None = None) -> LoraFolder | MultiplicativeAdapter:
    """The adapter in a local folder.

    shown: what an error names instead of the folder. Raises UserError for a folder that holds no adapter, is
    damaged, or holds an adapter that cannot be served exactly.
    """
    path = Path(folder).absolute()
    try:
        return _read(path)
    except UserError as error:
        problems = [Problem(KEY, shown or str(folder), problem.hint) for problem in error.problems]
        raise UserError(*problems) from error


def check_files(folder: Path) -> None:
    """Raises UserError unless the folder holds a configuration and tensors of a plausible size."""
    source = str(folder)
    try:
        if not folder.exists():
            raise user_error(KEY, source, "there is no such folder")
        if not folder.is_dir():
            raise user_error(KEY, source, "is not a folder: give the folder of adapter_config.json")
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        size = 0
        if weights is not None:
            size = weights.stat().st_size
    except (OSError, ValueError) as error:  # too long a name, a null byte, no permission
        raise user_error(KEY, source, f"cannot be read: {error}") from error
    if size > MOST_BYTES:
        hint = f"is too large for an adapter: {size:,} bytes of tensors, and the limit is {MOST_BYTES:,}"
        raise user_error(KEY, source, hint)


def _read(folder: Path) -> LoraFolder | MultiplicativeAdapter:
    source = str(folder)
    check_files(folder)
    config = read_config(source, KEY)
    if config.is_dora:
        raise user_error(KEY, source, DORA)
    if config.peft_type == "LORA":
        _, tensors = read_files(source, KEY)
        return LoraFolder(folder, check_lora(config, tensors, source, key=KEY))
    check_harmless(config, source, KEY)
    _, tensors = read_files(source, KEY)
    marks = ("_embedding_", *BASE_EMBEDDINGS)
    embedded = next((name for name in tensors if any(mark in name for mark in marks)), None)
    if embedded is not None:
        hint = (
            f"adapts an embedding or the output layer ({embedded}): fLoRA and IA3 are served on others only"
        )
        raise user_error(KEY, source, f"{hint}; serve it as a model (flora-train export RUN --as merged)")
    modules = check_tensors(config, tensors, source, key=KEY)
    if config.peft_type == "ADALORA":
        converted = as_lora(config, tensors)
        return LoraFolder(folder, check_lora(*converted, source, key=KEY), converted)
    factors: dict[str, list[Tensor]] = {}
    for module in sorted(modules):
        names = [f"{PREFIX}{module}.{suffix}" for suffix in SUFFIXES[config.peft_type]]
        factors[module] = [tensors[name].float() for name in names]
    if config.peft_type == "IA3":
        scales = {module: scale for module, (scale,) in factors.items()}
        return MultiplicativeAdapter("ia3", _ia3_multipliers(scales, config, source))
    keep_base = config.peft_type == "HIRA" or config.variant == "residual"
    multipliers = {module: flora_multiplier(A, B, keep_base) for module, (A, B) in factors.items()}
    return MultiplicativeAdapter("flora", multipliers)


def flora_multiplier(A: Tensor, B: Tensor, keep_base: bool) -> Multiplier:
    """W0 * (B A), plus W0 if keep_base, with as few ranks as possible.

    Ranks without effect are dropped, and so is a rank that subtracts the base (the last one of a pure fLoRA
    that was exported as HIRA). One rank stays.
    """
    subtracts = ((A == 1).all(dim=1) & (B == -1).all(dim=0)).nonzero().flatten().tolist()
    has_effect = A.any(dim=1) & B.any(dim=0)
    if keep_base and subtracts and int(has_effect.sum()) > 1:
        keep_base = False
        has_effect[subtracts[0]] = False
    if not has_effect.any():
        has_effect[0] = True
    return Multiplier(A[has_effect].contiguous(), B[:, has_effect].contiguous(), keep_base)


def _ia3_multipliers(scales: Mapping[str, Tensor], config: PeftConfig, source: str) -> dict[str, Multiplier]:
    """PEFT saves a scale of inputs as [1, in] and a scale of outputs as [out, 1]."""
    multipliers: dict[str, Multiplier] = {}
    for module, scale in scales.items():
        deviation, one = (scale - 1).contiguous(), torch.ones(1, 1)
        of_inputs = _scales_inputs(module, config)
        shape = tuple(scale.shape)
        if of_inputs is None:
            of_inputs = shape[0] == 1
        if shape[0 if of_inputs else 1] != 1:
            kind = "inputs" if of_inputs else "outputs"
            hint = (
                f"the scale of {module} has shape {shape}, and feedforward_modules makes it one of {kind}: "
            )
            raise user_error(KEY, source, f"{hint}the files do not belong together")
        if of_inputs:
            multipliers[module] = Multiplier(deviation, one, scales_input=True)
        else:
            multipliers[module] = Multiplier(one, deviation, scales_output=True)
    return multipliers


def _scales_inputs(module: str, config: PeftConfig) -> bool | None:
    """Whether PEFT takes a module as one of feedforward_modules; None if the file does not say."""
    feedforward = config.options.get("feedforward_modules")
    if isinstance(feedforward, str):
        try:
            return re.fullmatch(feedforward, module) is not None
        except re.error:
            return None
    if isinstance(feedforward, list):
        return any(module.endswith(str(suffix)) for suffix in feedforward)
    return None
