"""The tensors of a PEFT adapter: their names, and reading and checking them against adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from flora_train.adapters.peft_config import CONFIG, PeftConfig, read_config
from flora_train.config.errors import first_line, user_error
from flora_train.models.hub_files import adapter_folder

PREFIX = "base_model.model."
"""The start of every tensor name in a PEFT file."""

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

SUFFIXES = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "IA3": ("ia3_l",),
    "HIRA": ("hira_A", "hira_B"),
    "FLORA": ("flora_A", "flora_B"),
}
"""PEFT type -> what follows the module in a tensor's name. Every adapted module has each of them."""

MAGNITUDE = "lora_magnitude_vector"
"""The additional tensor of a DoRA, which is a LORA in PEFT."""


def suffixes_of(config: PeftConfig) -> tuple[str, ...]:
    """What follows the module in the names of an adapter's tensors."""
    suffixes: tuple[str, ...] = SUFFIXES[config.peft_type]
    return (*suffixes, MAGNITUDE) if config.is_dora else suffixes


HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS")
"""PEFT's task types of adapters with a head."""


def split_head(
    config: PeftConfig, tensors: Mapping[str, Tensor]
) -> tuple[PeftConfig, dict[str, Tensor], dict[str, Tensor]]:
    """The adapter without its head, and the head: parameter, as in a checkpoint of transformers -> tensor.

    The head of a classifier are the modules that PEFT saves as a whole. Of other task types, nothing is
    changed: a whole module may be any part of a model.
    """
    saved = config.options.get("modules_to_save")
    if config.options.get("task_type") not in HEAD_TASKS or not isinstance(saved, list):
        return config, dict(tensors), {}
    names = {str(name) for name in saved} | {"classifier", "score"}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parameter = name.removeprefix(PREFIX)
        if names & set(parameter.split(".")[:-1]):
            head[parameter] = tensor
    rest = {name: tensor for name, tensor in tensors.items() if name.removeprefix(PREFIX) not in head}
    left_out = ("modules_to_save", "task_type")
    options = {key: value for key, value in config.options.items() if key not in left_out}
    return PeftConfig(options), rest, head


SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys of adapter_config.json that select the adapted modules."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_files(source: str, key: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The content of adapter_config.json and the tensors, on the CPU, of a PEFT adapter of any type.

    source: a folder, or a name on the hub. Raises UserError, naming `key`, where a file is missing or
    damaged, or a tensor is not dense or holds numbers that are not finite.
    """
    from peft.utils import load_peft_weights

    config = read_config(source, key)
    folder = adapter_folder(source)
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise user_error(key, source, f"is not a PEFT adapter: it lacks {WEIGHTS[0]} (or {WEIGHTS[1]})")
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors, pickle and the hub client each raise their own types
        raise user_error(
            key, source, f"is not a PEFT adapter: its tensors cannot be read: {first_line(error)}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise user_error(key, source, f"is not a PEFT adapter: {WEIGHTS[0]} does not hold named tensors")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise user_error(key, source, f"is damaged: {name} is not a dense tensor")
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise user_error(
                key, source, f"is damaged: {name} holds numbers that are not finite (NaN or infinite)"
            )
    return config, tensors


def check_tensors(config: PeftConfig, tensors: Mapping[str, Tensor], source: str, *, key: str) -> set[str]:
    """The names of the adapted modules.

    Raises UserError for a tensor that the adapter's type does not have, for a missing tensor, and for a shape
    or dtype that does not agree with adapter_config.json.
    """
    peft_type = config.peft_type
    suffixes_in: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes_of(config) if name.endswith(f".{suffix}")), None)
        if suffix is None or not name.startswith(PREFIX):
            hint = f"holds {name}, which is not a tensor of a plain {peft_type}: it cannot be used here"
            raise user_error(key, source, hint)
        if tensor.dtype not in DTYPES:
            hint = f"{name} has dtype {tensor.dtype}: float32, float16 and bfloat16 are supported"
            raise user_error(key, source, hint)
        module = name.removeprefix(PREFIX).removesuffix(f".{suffix}")
        if not _fits(suffix, tuple(tensor.shape), module, config=config):
            shape = tuple(tensor.shape)
            hint = (
                f"{name} has shape {shape}, which {CONFIG} does not allow: the files do not belong together"
            )
            raise user_error(key, source, hint)
        suffixes_in.setdefault(module, set()).add(suffix)
    for module, suffixes in suffixes_in.items():
        if missing := {*suffixes_of(config)} - suffixes:
            raise user_error(key, source, f"is damaged: it lacks {PREFIX}{module}.{min(missing)}")
    if not suffixes_in:
        raise user_error(key, source, "is damaged: it holds no tensors")
    return set(suffixes_in)


def _fits(suffix: str, shape: tuple[int, ...], module: str, *, config: PeftConfig) -> bool:
    """Whether a tensor of this shape agrees with the module's rank in adapter_config.json."""
    if suffix == MAGNITUDE:
        return len(shape) == 1 and 0 not in shape
    if len(shape) != 2 or 0 in shape:
        return False
    if config.peft_type == "IA3":
        return 1 in shape
    if suffix == "lora_E":
        return shape == (config.rank, 1)
    ranks = [config.rank_at(module)]
    if config.peft_type == "HIRA":
        ranks.append(config.rank)  # peft 0.21 does not use the rank_pattern of a HIRA
    return shape[int("_B" in suffix)] in ranks


def with_whole_names(
    tensors: Mapping[str, Tensor], modules: Collection[str], model_modules: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of an adapter by the names that the whole model has for its modules: those of embeddings
    are named as the model's body (AutoModel) names them. Others are unchanged.

    modules: those with tensors; model_modules: all modules of the whole model.
    """
    names = set(model_modules)
    unknown = min((module for module in modules if module not in names), default=None)
    if unknown is None:
        return dict(tensors)
    prefixes = [name.removesuffix(unknown) for name in names if name.endswith(f".{unknown}")]
    for prefix in sorted(prefixes, key=len):
        if all(f"{prefix}{module}" in names for module in modules):
            return {f"{PREFIX}{prefix}{name.removeprefix(PREFIX)}": tensors[name] for name in tensors}
    return dict(tensors)


def check_targets(
    config: PeftConfig,
    modules: Collection[str],
    model_modules: Iterable[str],
    *,
    source: str,
    key: str,
) -> None:
    """Raises UserError where PEFT would adapt other modules than those that have tensors.

    modules: those with tensors; model_modules: the names of all modules of the base model.
    """
    target_modules = config.options.get("target_modules")
    if target_modules is None or target_modules == "all-linear":
        return  # PEFT then selects by the model's type; the tensors show which modules those were
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    options = {name: config.options[name] for name in SELECTION if config.options.get(name) is not None}
    try:
        selection = LoraConfig(**options)  # every PEFT type reads these keys in the same way
        targets = {name for name in model_modules if name and check_target_module_exists(selection, name)}
    except (ValueError, TypeError, KeyError, re.error) as error:
        raise user_error(key, source, f"is damaged: PEFT refuses {CONFIG}: {first_line(error)}") from error
    if surplus := set(modules) - targets:
        hint = f"has tensors for {min(surplus)}, not selected by its target_modules: PEFT would ignore them"
        raise user_error(key, source, hint)
    if absent := targets - set(modules):
        hint = f"has no tensors for {min(absent)}, selected by its target_modules: PEFT would initialise it"
        raise user_error(key, source, hint)
