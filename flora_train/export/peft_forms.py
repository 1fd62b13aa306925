"""What an adapter is written as: the content of PEFT's two files, from its layers, its settings and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from flora_train.adapters.methods import METHODS, Target
from flora_train.adapters.peft_files import ADALORA_EPSILON, PREFIX
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import shortest_suffixes

Form = Literal["own", "FLORA", "ADALORA"]
"""own: LORA, IA3, and HIRA for fLoRA. FLORA: fLoRA under a type of its own. ADALORA: a LoRA with the numbers of its LORA, where PEFT converts LORA's
tensors to those of a model's joined experts and would leave some out."""

Layers = Mapping[str, Target]


def config_of(
    model: nn.Module, names: Iterable[str], layers: Layers, spec: AdapterSpec, base_model: str, form: Form
) -> dict[str, Any]:
    """The content of adapter_config.json. names: of all modules of the model as it was before any adapter."""
    # JointSpeedup, because PEFT wants its feedforward_modules to be some of its target_modules, word by word.
    names = list(names)
    inputs, outputs = (
        shortest_suffixes(names, [target.name for target in layers.values() if target.feedforward is feedforward])
        for feedforward in (True, False)
    )
    targets = sorted([*outputs, *inputs])
    if form == "FLORA":
        variant = "residual" if spec.offset else "pure"
        method: dict[str, Any] = {"peft_type": "FLORA", "r": spec.rank, "variant": variant, "target_modules": targets}
    elif form == "ADALORA":
        method = _adalora_config(spec, targets)
    else:
        method = METHODS[spec.method].peft_config(spec, targets, inputs)
    return {
        **method,
        "base_model_name_or_path": base_model,
        "task_type": task_type_of(model),
        "inference_mode": True,
        "fan_in_fan_out": any(target.transposed for target in layers.values()),
    }


def _adalora_config(spec: AdapterSpec, targets: list[str]) -> dict[str, Any]:
    """PEFT asks for a schedule of ranks, which has no meaning after training; this one passes its checks."""
    schedule = {"init_r": spec.rank, "target_r": spec.rank, "tinit": 0, "tfinal": 0, "total_step": 1}
    scale = {"lora_alpha": spec.scaling * spec.rank, "lora_dropout": spec.dropout}
    return {"peft_type": "ADALORA", **schedule, **scale, "bias": "none", "target_modules": targets}


def tensors_of(rows: Mapping[str, Mapping[str, Tensor]], layers: Layers, spec: AdapterSpec, form: Form) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names. rows: module -> parameter -> its numbers."""
    found: dict[str, Tensor] = {}
    for module, params in rows.items():
        if form == "FLORA":
            parts: Mapping[str, Tensor] = {"flora_A": params["A"], "flora_B": params["B"]}
        elif form == "ADALORA":
            ones = params["A"].new_full((spec.rank, 1), (spec.rank + ADALORA_EPSILON) / spec.rank)
            parts = {"lora_A": params["A"], "lora_B": params["B"], "lora_E": ones}
        else:
            parts = METHODS[spec.method].peft_tensors(params, spec, layers[module].feedforward)
        found |= {f"{PREFIX}{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    return found


def task_type_of(model: Any) -> str | None:
    """PEFT's word for the kind of model; None for all that are no language model of tokens. PEFT would hand `input_ids` to a speech model, and look
    for the saved head of a classifier."""
    from transformers.models.auto import modeling_auto as auto

    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    name = model_class(model).__name__
    if name in _values(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return "SEQ_2_SEQ_LM"
    remote = str((getattr(model.config, "auto_map", None) or {}).get("AutoModelForCausalLM", ""))
    if name in _values(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or name.endswith("ForCausalLM") or remote.endswith(f".{name}"):
        return "CAUSAL_LM"
    return None


def model_class(model: nn.Module) -> type[nn.Module]:
    """The model's class, without what FSDP puts before it."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def _values(names: Mapping[str, Any]) -> set[str]:
    return {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}
