"""Checks of LORA folders before vLLM reads them: options, names, shapes and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flora_train.adapters.peft_config import CONFIG, INITS, PeftConfig, check_harmless, check_init
from flora_train.adapters.peft_tensors import DTYPES, PREFIX
from flora_train.config.errors import user_error

FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
"""End of a tensor's name -> the factor that it is."""
CLASSIFIERS = ("classifier", "score")
"""Modules that vLLM replaces by those of the adapter."""
BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
"""Copies of the base's weights that PEFT saves beside an adapter, and vLLM ignores."""
EXPERTS = "experts"
"""Part of the name of a mixture's layers, whose tensors hold several experts."""
INITS_OF_VLLM = ("mica",)
"""Further values of init_lora_weights that leave the base unchanged."""


@dataclass(frozen=True)
class LayerShapes:
    """The sizes of an adapter on one linear layer."""

    inputs: int
    outputs: int
    rank: int


def check_lora(
    config: PeftConfig, tensors: Mapping[str, Tensor], source: str, *, key: str
) -> dict[str, LayerShapes]:
    """The sizes of a LORA by module, without the layers of experts, which vLLM checks.

    Raises UserError for options that vLLM would ignore although they change what PEFT computes, and for
    tensors that do not belong to the adapter.
    """
    _check_options(config, source, key)
    factors: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in FACTORS if name.endswith(ending)), None)
        if ending is None:
            if _is_whole_module(name, config):
                continue
            hint = f"holds {name}, which is not a tensor of a plain LORA: it cannot be served"
            raise user_error(key, source, hint)
        if tensor.dtype not in DTYPES:
            hint = f"{name} has dtype {tensor.dtype}: float32, float16 and bfloat16 are supported"
            raise user_error(key, source, hint)
        module = name.removeprefix(PREFIX).removesuffix(ending)
        factors.setdefault(module, {})[FACTORS[ending]] = (name, tensor)
    if not factors:
        raise user_error(key, source, "is damaged: it holds no tensors")
    return {
        module: _shapes(module, pair, config, source=source, key=key)
        for module, pair in factors.items()
        if not _is_expert(module) or len(pair) < 2
    }


def _check_options(config: PeftConfig, source: str, key: str) -> None:
    options: dict[str, Any] = dict(config.options)
    modules = options.get("modules_to_save")
    if isinstance(modules, list) and set(modules) <= set(CLASSIFIERS):
        del options["modules_to_save"]
    if isinstance(options.get("task_type"), str):
        del options["task_type"]  # vLLM serves classifiers and rewards, too
    options.pop("target_parameters", None)  # of experts
    if options.get("init_lora_weights") in INITS_OF_VLLM:
        del options["init_lora_weights"]
    plain = PeftConfig(options)
    check_harmless(plain, source, key)
    if not INITS(options.get("init_lora_weights")):
        check_init(plain, source, key)


def _is_whole_module(name: str, config: PeftConfig) -> bool:
    """Whether a tensor belongs to a module that vLLM replaces, or is one that vLLM ignores."""
    if name.endswith(BASE_EMBEDDINGS):
        return True
    modules = config.options.get("modules_to_save")
    *_, owner, parameter = f".{name}".split(".")
    return isinstance(modules, list) and owner in modules and parameter in ("weight", "bias")


def _is_expert(module: str) -> bool:
    return EXPERTS in module.split(".")


def _shapes(
    module: str, pair: Mapping[str, tuple[str, Tensor]], config: PeftConfig, *, source: str, key: str
) -> LayerShapes:
    if len(pair) < 2:
        present, _ = next(iter(pair.values()))
        lacking = min({"A", "B"} - set(pair))
        raise user_error(key, source, f"is damaged: it has {present}, and no {lacking} of that layer")
    rank = config.rank_at(module)
    (A_name, A), (B_name, B) = pair["A"], pair["B"]
    for name, tensor, axis in ((A_name, A, 0), (B_name, B, 1)):
        shape = tuple(tensor.shape)
        if len(shape) != 2 or 0 in shape or shape[axis] != rank:
            hint = f"{name} has shape {shape}, and {CONFIG} the rank {rank}: the files do not belong together"
            raise user_error(key, source, hint)
    return LayerShapes(A.shape[1], B.shape[0], A.shape[0])
