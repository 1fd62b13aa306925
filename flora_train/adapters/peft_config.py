"""Reads adapter_config.json of a PEFT adapter and accepts only options that do not change what its tensors
compute."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora_train.adapters.spec import scaling_of
from flora_train.config.errors import UserError, choices, first_line, user_error
from flora_train.config.json_format import JsonObject, JsonValue
from flora_train.config.name_patterns import check_pattern_keys, value_for
from flora_train.models.hub_files import adapter_folder

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 16 * 2**20
"""Size limit of adapter_config.json. A list of ten thousand module names takes 1 MiB."""

Rule = Callable[[Any], bool]
"""Whether a value of adapter_config.json is harmless."""


def _anything(value: Any) -> bool:
    return True


def _off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _optional_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _names(value: Any) -> bool:
    return _text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _numbers(value: Any) -> bool:
    return (
        value is None
        or type(value) is int
        or (isinstance(value, list) and all(type(index) is int for index in value))
    )


def _size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _pattern_of(rule: Rule) -> Rule:
    """Of a rank_pattern or alpha_pattern: regular expressions with values that `rule` accepts."""

    def is_pattern(value: Any) -> bool:
        if value is None:
            return True
        if not isinstance(value, dict) or not all(map(rule, value.values())):
            return False
        try:
            check_pattern_keys(value)
        except ValueError:
            return False
        return True

    return is_pattern


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _one_of(*allowed: Any) -> Rule:
    return lambda value: any(type(value) is type(known) and value == known for known in allowed)


ANY_TYPE: dict[str, Rule] = {
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
"""Keys that every PEFT type has. PEFT derives fan_in_fan_out from the layer's type, and does not read
runtime_config from files."""

SOME_LAYERS: dict[str, Rule] = {
    "layers_to_transform": _numbers,
    "layers_pattern": _names,
    "rank_pattern": _pattern_of(_size),
}
"""The adapted layers are compared with the adapter's tensors (peft_tensors.py)."""

INITS = _one_of(None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model unchanged. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
change it; MiCA freezes B."""

REPEATABLE_INITS = ("pissa", "olora")
"""Values of init_lora_weights whose change of the base model depends on its weights alone."""
OTHER_INITS = ("corda", "lora_ga")
"""Values whose change depends on data as well; it is known from the initial adapter."""


def subtracted_init(value: Any) -> str | None:
    """The method that subtracts its initial adapter from the base model, by the name of its folder of PEFT's
    conversion: pissa, olora, corda or lora_ga. None for every other value of init_lora_weights."""
    if not isinstance(value, str):
        return None
    if value in (*REPEATABLE_INITS, *OTHER_INITS):
        return value
    return "pissa" if re.fullmatch(r"pissa_niter_\d+", value) else None


def _known_init(value: Any) -> bool:
    return INITS(value) or subtracted_init(value) is not None


ADALORA_EPSILON = 1e-5
"""PEFT divides the update of an ADALORA by its rank plus this."""

LORA: dict[str, Rule] = {
    **ANY_TYPE,
    **SOME_LAYERS,
    "r": _size,
    "lora_alpha": _number,
    "lora_dropout": _number,
    "use_rslora": _flag,
    "use_dora": _optional_flag,
    "init_lora_weights": _known_init,
    "bias": _one_of("none"),
    "alpha_pattern": _pattern_of(_number),
    "megatron_config": _off,
    "megatron_core": _anything,
    "qalora_group_size": _anything,
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _anything),
    **dict.fromkeys(
        (
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
"""The configuration of an initialisation has no effect unless init_lora_weights names it. PEFT keeps it when
it converts a CorDA."""

ADALORA: dict[str, Rule] = {
    **LORA,
    "r": _anything,
    "rank_pattern": _off,
    "alpha_pattern": _off,
    "use_dora": _off,
    "init_lora_weights": INITS,
    "lora_alpha": _positive,
    "use_rslora": _anything,
    "init_r": _size,
    **dict.fromkeys(
        ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        _anything,
    ),
}
"""Without a rank_pattern, which PEFT writes once it has pruned ranks, this is a LORA with a scale for each
rank."""

HARMLESS: dict[str, dict[str, Rule]] = {
    "LORA": LORA,
    "ADALORA": ADALORA,
    "IA3": {**ANY_TYPE, "feedforward_modules": _names, "init_ia3_weights": _flag},
    "HIRA": {
        **ANY_TYPE,
        **SOME_LAYERS,
        "r": _size,
        "hira_dropout": _number,
        "init_weights": _one_of(None, True, False, "gaussian"),
    },
    "FLORA": {
        **ANY_TYPE,
        **SOME_LAYERS,
        "r": _size,
        "variant": _one_of("pure", "residual"),
        "flora_dropout": _number,
    },
}
"""PEFT type -> key of adapter_config.json -> values with which the tensors alone define what the adapter
computes."""

REQUIRED = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "IA3": (),
    "HIRA": ("r",),
    "FLORA": ("r", "variant"),
}

RANK_KEYS = {"ADALORA": "init_r"}
"""PEFT type -> the key of its rank, if it is not `r`."""

CONVERT = (
    "its tensors are relative to a changed base model: save it again with PEFT's "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=...), which writes a plain LoRA"
)
INIT_HINTS = {
    "loftq": "its tensors are relative to a base model that PEFT quantized, which is not known: merge the "
    "adapter in PEFT, and give the merged model as model.path",
    "mica": "its B is frozen, which no method here does; set this key to true in the file to train A and B",
}
"""Value of init_lora_weights -> its hint, where it is not that of all."""
HINTS = {
    "init_lora_weights": CONVERT,
    "task_type": "supported are causal and encoder-decoder language models, and adapters without a task_type",
    "r": "must be a whole number of 1 or more",
    "init_r": "must be a whole number of 1 or more",
    "lora_alpha": "must be a number",
    "variant": "must be 'pure' or 'residual'",
    "rank_pattern": "must have regular expressions as keys and whole numbers of 1 or more as values",
    "alpha_pattern": "must have regular expressions as keys and numbers as values",
}


@dataclass(frozen=True)
class PeftConfig:
    """The content of adapter_config.json.

    Options of another type than expected are None until `check_harmless` refuses them.
    """

    options: Mapping[str, JsonValue]
    """All keys of the file."""

    @property
    def peft_type(self) -> str:
        """LORA, IA3, HIRA, ..."""
        return str(self.options["peft_type"])

    @property
    def rank(self) -> int | None:
        """None where the PEFT type has no rank."""
        rank = self.options.get(RANK_KEYS.get(self.peft_type, "r"))
        return rank if isinstance(rank, int) else None

    @property
    def alpha(self) -> float | None:
        alpha = self.options.get("lora_alpha")
        return alpha if isinstance(alpha, int | float) else None

    @property
    def rslora(self) -> bool:
        """Whether alpha is divided by the square root of the rank."""
        return bool(self.options.get("use_rslora"))

    @property
    def is_dora(self) -> bool:
        """Whether a LORA is a DoRA."""
        return self.peft_type == "LORA" and bool(self.options.get("use_dora"))

    @property
    def subtracted_init(self) -> str | None:
        """The method (such as pissa) that subtracts its initial adapter from the base model; None for an
        adapter of an unchanged base model."""
        return subtracted_init(self.options.get("init_lora_weights")) if self.peft_type == "LORA" else None

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Pattern -> rank of the modules that it matches."""
        pattern: Any = self.options.get("rank_pattern")
        return dict(pattern) if isinstance(pattern, dict) else {}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Pattern -> alpha of the modules that it matches."""
        pattern: Any = self.options.get("alpha_pattern")
        return dict(pattern) if isinstance(pattern, dict) else {}

    def rank_at(self, module: str) -> int | None:
        """The rank on one module."""
        return value_for(self.rank_pattern, module, self.rank)

    def scale_at(self, module: str) -> float:
        """The factor of B A in a LORA on one module."""
        rank, alpha = self.rank_at(module), value_for(self.alpha_pattern, module, self.alpha)
        assert rank is not None, "check_harmless requires it"
        assert alpha is not None, "check_harmless requires it"
        return scaling_of(rank, alpha, self.rslora)

    @property
    def variant(self) -> str | None:
        """Of a FLORA: pure or residual."""
        variant = self.options.get("variant")
        return variant if isinstance(variant, str) else None

    @property
    def base_model(self) -> str | None:
        """Folder or name on the hub."""
        base = self.options.get("base_model_name_or_path")
        return base if isinstance(base, str) else None


def read_config(source: str, key: str) -> PeftConfig:
    """The content of adapter_config.json. Raises UserError, naming `key`, where it is missing or damaged.

    source: a folder, or a name on the hub.
    """
    try:
        file = _config_file(source)
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{CONFIG} is longer than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise user_error(key, source, f"is not a PEFT adapter: {CONFIG} is nested too deeply") from error
    except Exception as error:  # json, the system and the hub client each raise their own types
        raise user_error(
            key, source, f"is not a PEFT adapter, in a folder or on the hub: {first_line(error)}"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise user_error(key, source, f"is not a PEFT adapter: {CONFIG} has no peft_type")
    return PeftConfig(config)


def _config_file(source: str) -> Path:
    folder = adapter_folder(source)
    file = folder / CONFIG
    if not file.is_file() and (folder / "routing.json").is_file():
        hint = f"whose parts are PEFT adapters: name one of them, such as {source.rstrip('/')}/expert_0"
        raise ValueError(f"it is a routed adapter (routing.json), {hint}")
    if not file.is_file():
        raise ValueError(f"there is no {CONFIG}")
    return file


def _unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    """A JSON object. Raises ValueError for a key that occurs twice."""
    content: JsonObject = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{CONFIG} has the key {name!r} twice")
        content[name] = value
    return content


def check_harmless(config: PeftConfig, source: str, key: str) -> None:
    """Raises UserError for the first key of adapter_config.json that is missing or not known to be
    harmless."""
    peft_type = config.peft_type
    if peft_type not in HARMLESS:
        raise user_error(key, source, f"has the PEFT type {peft_type}: supported are {choices(HARMLESS)}")
    rules = HARMLESS[peft_type]
    for name, value in config.options.items():
        is_harmless = rules.get(name, _off)
        if not is_harmless(value):
            raise _refused(name, value, source, key=key, known=name in rules)
    for name in REQUIRED[peft_type]:
        if name not in config.options:
            raise user_error(key, source, f"is damaged: {CONFIG} has no {name}")


def check_init(config: PeftConfig, source: str, key: str) -> None:
    """Raises UserError for a LORA that PEFT loads onto a changed base model, or whose base model it cannot
    restore."""
    name = "init_lora_weights"
    if name in config.options and not INITS(config.options[name]):
        raise _refused(name, config.options[name], source, key=key, known=True)


def _refused(name: str, value: Any, source: str, *, key: str, known: bool) -> UserError:
    given = repr(value)
    if len(given) > 60:
        given = f"{given[:57]}..."
    hint = HINTS.get(name, "this option is not supported, so that the adapter cannot be used here")
    if name == "init_lora_weights" and isinstance(value, str):
        hint = INIT_HINTS.get(value, hint)
    if not known:
        hint = (
            "unknown key, which may change what the adapter computes: remove it from the file if it does not"
        )
    return user_error(key, source, f"has {name}={given} in {CONFIG}: {hint}")
