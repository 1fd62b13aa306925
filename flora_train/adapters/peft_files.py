"""Reads the two files of a PEFT adapter and accepts only what is known to compute what LORA, IA3, HIRA, FLORA or ADALORA compute."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora_train.config.errors import UserError, choices, first_line, user_error
from flora_train.config.paths import find_file

PREFIX = "base_model.model."
"""The start of every tensor's name in a PEFT file."""

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
LONGEST_CONFIG = 16 * 2**20
"""Bytes of adapter_config.json. A list of ten thousand module names takes one MiB."""

Rule = Callable[[Any], bool]
"""Whether a value of adapter_config.json is harmless."""


def _anything(value: Any) -> bool:
    return True


def _off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _names(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _numbers(value: Any) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(index) is int for index in value))


def _size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _one_of(*allowed: Any) -> Rule:
    return lambda value: any(type(value) is type(known) and value == known for known in allowed)


ANY_KIND: dict[str, Rule] = {
    "peft_type": _text,
    "task_type": _one_of(None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"),
    "auto_mapping": _anything,
    "peft_version": _text,
    "base_model_name_or_path": _text,
    "revision": _text,
    "inference_mode": _flag,
    "runtime_config": _anything,
    "target_modules": _names,
    "exclude_modules": _names,
    "fan_in_fan_out": _flag,
    "modules_to_save": _off,
}
"""Keys that every kind has. PEFT itself takes fan_in_fan_out from the layer's type, and does not read runtime_config from files."""

SOME_LAYERS: dict[str, Rule] = {"layers_to_transform": _numbers, "layers_pattern": _names, "rank_pattern": _off}
"""Which layers an adapter is on is compared with its tensors."""

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that say which modules an adapter is on."""

INITS = _one_of(None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it; MiCA computes otherwise."""

ADALORA_EPSILON = 1e-5
"""PEFT divides the change of an ADALORA by its rank and this."""

LORA: dict[str, Rule] = {
    **ANY_KIND,
    **SOME_LAYERS,
    "r": _size,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "use_rslora": _flag,
    "init_lora_weights": INITS,
    "bias": _one_of("none"),
    "alpha_pattern": _off,
    "megatron_config": _off,
    "megatron_core": _anything,
    "qalora_group_size": _anything,
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _anything),
    **dict.fromkeys(
        (
            "use_dora",
            "lora_bias",
            "use_qalora",
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "ensure_weight_tying",
            "velora_config",
            "monteclora_config",
            "alora_invocation_tokens",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        ),
        _off,
    ),
}
"""The configurations of an initialisation have no meaning once init_lora_weights names none: PEFT keeps them when it converts a CorDA."""

ADALORA: dict[str, Rule] = {
    **LORA,
    "r": _anything,
    "lora_alpha": _positive,
    "use_rslora": _anything,
    "init_r": _size,
    **dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"), _anything),
}
"""Without a rank_pattern, which PEFT writes once it has taken ranks away, this is a LORA with a scale for each rank."""

HARMLESS: dict[str, dict[str, Rule]] = {
    "LORA": LORA,
    "ADALORA": ADALORA,
    "IA3": {**ANY_KIND, "feedforward_modules": _names, "init_ia3_weights": _flag},
    "HIRA": {
        **ANY_KIND,
        **SOME_LAYERS,
        "r": _size,
        "hira_dropout": _number,
        "init_weights": _one_of(None, True, False, "gaussian"),
    },
    "FLORA": {
        **ANY_KIND,
        **SOME_LAYERS,
        "r": _size,
        "variant": _one_of("pure", "residual"),
        "flora_dropout": _number,
    },
}
"""Kind -> key of adapter_config.json -> the values with which the adapter computes what its tensors alone say."""

REQUIRED = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "IA3": (),
    "HIRA": ("r",),
    "FLORA": ("r", "variant"),
}

SUFFIXES = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "ADALORA": ("lora_A", "lora_B", "lora_E"),
    "IA3": ("ia3_l",),
    "HIRA": ("hira_A", "hira_B"),
    "FLORA": ("flora_A", "flora_B"),
}
"""Kind -> what follows the module in the name of a tensor: every adapted module has each of them."""

CONVERT = (
    "its numbers are a difference to a changed base model: save it again by PEFT's "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=...), which writes a plain LoRA"
)
FIXES = {
    "init_lora_weights": CONVERT,
    "task_type": "adapters of causal and encoder-decoder language models, and those without a task_type, can be used",
    "r": "must be a whole number of 1 or more",
    "init_r": "must be a whole number of 1 or more",
    "lora_alpha": "must be a number",
    "variant": "must be 'pure' or 'residual'",
}


def kind_of(config: Mapping[str, Any]) -> str:
    """PEFT's word for it: LORA, IA3, HIRA, ..."""
    return str(getattr(config["peft_type"], "value", config["peft_type"]))


def read_files(source: str, key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json as it is written, and the tensors, on the CPU, of a PEFT adapter of any kind: a folder, or a name on the hub.

    Raises UserError, naming `key`, where they are missing or damaged, or hold numbers that are not finite.
    """
    from peft.utils import load_peft_weights

    config = read_config(source, key)
    local = find_file(source)
    if local.exists() and not any((local / name).is_file() for name in WEIGHTS):
        raise user_error(key, source, f"is no PEFT adapter: it lacks {WEIGHTS[0]} (or {WEIGHTS[1]})")
    try:
        tensors = load_peft_weights(str(local) if local.exists() else source, device="cpu")
    except Exception as error:  # safetensors, pickle and the hub's client each have their own
        raise user_error(key, source, f"is no PEFT adapter: its tensors cannot be read: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise user_error(key, source, "is no PEFT adapter: its file of tensors holds something else")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise user_error(key, source, f"is damaged: {name} is no dense tensor")
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise user_error(key, source, f"is damaged: {name} holds numbers that are not finite (NaN or infinite)")
    return config, tensors


def read_config(source: str, key: str) -> dict[str, Any]:
    """adapter_config.json as it is written. Raises UserError, naming `key`, where it is missing or damaged."""
    local = find_file(source)
    try:
        if local.exists():
            file = local / CONFIG
            if not file.is_file():
                raise ValueError(f"there is no {CONFIG}")
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(source, CONFIG))
        if file.stat().st_size > LONGEST_CONFIG:
            raise ValueError(f"{CONFIG} is longer than {LONGEST_CONFIG} bytes")
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise user_error(key, source, f"is no PEFT adapter: {CONFIG} is nested too deeply") from error
    except Exception as error:  # json, the system and the hub's client each have their own
        raise user_error(key, source, f"is no PEFT adapter, in a folder or on the hub: {first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise user_error(key, source, f"is no PEFT adapter: {CONFIG} has no peft_type")
    return config


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{CONFIG} has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def check_harmless(config: Mapping[str, Any], source: str, key: str) -> None:
    """Raises UserError for the first key of adapter_config.json that is not known to be harmless, or that is missing."""
    kind = kind_of(config)
    if kind not in HARMLESS:
        raise user_error(key, source, f"is of kind {kind}: kinds that can be used are {choices(HARMLESS)}")
    rules = HARMLESS[kind]
    for name, value in config.items():
        if not rules.get(name, _off)(value):
            raise _refused(name, value, source, key, known=name in rules)
    for name in REQUIRED[kind]:
        if name not in config:
            raise user_error(key, source, f"is damaged: {CONFIG} has no {name}")


def check_init(config: Mapping[str, Any], source: str, key: str) -> None:
    """Raises UserError for a LORA that PEFT loads onto a changed base model, or whose base model it cannot make again."""
    name = "init_lora_weights"
    if name in config and not INITS(config[name]):
        raise _refused(name, config[name], source, key, known=True)


def _refused(name: str, value: Any, source: str, key: str, known: bool) -> UserError:
    given = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    hint = FIXES.get(name, "no adapter here has that, so that it cannot be trained on")
    if not known:
        hint = "a key that is not known here and may change what the adapter computes: remove it from the file if it does not"
    return user_error(key, source, f"has {name}={given} in {CONFIG}: {hint}")


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, key: str) -> set[str]:
    """The adapted modules. Raises UserError for a tensor that no part of this kind accounts for, and for a missing one, or one of another shape
    or dtype than adapter_config.json says."""
    kind = kind_of(config)
    parts: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in SUFFIXES[kind] if name.endswith(f".{suffix}")), None)
        if suffix is None or not name.startswith(PREFIX):
            raise user_error(key, source, f"holds {name}, which is no tensor of a plain {kind}: it cannot be trained on")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise user_error(key, source, f"{name} is of {tensor.dtype}: float32, float16 and bfloat16 can be used")
        if not _fits(kind, suffix, tuple(tensor.shape), config):
            raise user_error(
                key,
                source,
                f"{name} has shape {tuple(tensor.shape)}, which is not that of {CONFIG}: the files do not belong together",
            )
        parts.setdefault(name.removeprefix(PREFIX).removesuffix(f".{suffix}"), set()).add(suffix)
    for module, found in parts.items():
        if missing := set(SUFFIXES[kind]) - found:
            raise user_error(key, source, f"is damaged: it lacks {PREFIX}{module}.{min(missing)}")
    if not parts:
        raise user_error(key, source, "is damaged: it holds no tensors")
    return set(parts)


def _fits(kind: str, suffix: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    if len(shape) != 2 or 0 in shape:
        return False
    if kind == "IA3":
        return 1 in shape
    rank = config["init_r" if kind == "ADALORA" else "r"]
    if suffix == "lora_E":
        return shape == (rank, 1)
    return shape[1 if "_B" in suffix else 0] == rank


def check_targets(
    config: Mapping[str, Any], modules: Collection[str], model_modules: Iterable[str], source: str, key: str
) -> None:
    """Raises UserError where PEFT would put the adapter on other modules than those that it has tensors for.

    modules: those with tensors; model_modules: the names of all modules of the base model.
    """
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":
        return  # PEFT then goes by the model's type; the tensors say which modules that were
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = {name: config[name] for name in SELECTION if config.get(name) is not None}
    try:
        selection = LoraConfig(**chosen)  # every kind reads these keys alike
        targets = {name for name in model_modules if name and check_target_module_exists(selection, name)}
    except (ValueError, TypeError, KeyError, re.error) as error:
        raise user_error(key, source, f"is damaged: {CONFIG} is refused by PEFT: {first_line(error)}") from error
    if surplus := set(modules) - targets:
        raise user_error(
            key, source, f"has tensors for {min(surplus)}, which its target_modules does not name: PEFT would leave them out"
        )
    if absent := targets - set(modules):
        raise user_error(
            key, source, f"has no tensors for {min(absent)}, which its target_modules names: PEFT would start it anew"
        )
