"""The content of PEFT's two adapter files, made from an adapter's layers, settings and tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from flora_train.adapters.heads import Head
from flora_train.adapters.methods import METHODS, Target
from flora_train.adapters.peft_config import ADALORA_EPSILON
from flora_train.adapters.peft_tensors import PREFIX
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import shortest_suffixes
from flora_train.export.expert_forms import (
    has_experts,
    lora_tensors,
    own_config,
    own_tensors,
    parameter_names,
    split_targets,
)
from flora_train.models.encoders import body_prefix

Form = Literal["own", "FLORA", "ADALORA", "EXPERTS"]
"""own: LORA, IA3, and HIRA for fLoRA. FLORA: fLoRA under its own PEFT type. ADALORA: a LoRA with unchanged
tensors, for models whose joined experts make PEFT convert the tensors of a LORA and drop some. EXPERTS: fLoRA
and IA3 on fused experts, which PEFT has no form for."""

Layers = Mapping[str, Target]


@dataclass(frozen=True)
class BaseModel:
    """The base model that adapter_config.json names."""

    path: str
    """Folder or name on the hub."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    identity: Mapping[str, str] | None = None
    """SHA-256 of its files (see base_identity), for BASE_RECORD; None if unknown."""


EMBEDDINGS = "FEATURE_EXTRACTION"
"""PEFT's task type of adapters that learn embeddings, which it loads onto the body of a model (AutoModel)."""
TASK_TYPES = {"text": "SEQ_CLS", "tokens": "TOKEN_CLS"}
"""Kind of a head -> PEFT's task type."""


def config_of(
    model: nn.Module,
    names: Iterable[str],
    layers: Layers,
    *,
    spec: AdapterSpec,
    base: BaseModel,
    form: Form,
    head: Head | None = None,
) -> dict[str, Any]:
    """The content of adapter_config.json. names: all modules of the model before any adapter was attached;
    head: of an adapter of a label task, whose modules PEFT saves as a whole."""
    names, prefix = list(names), ""
    if spec.pooling is not None:
        prefix = body_prefix(model)
        names, layers = _in_body(prefix, names, layers)
    layers, experts = split_targets(layers)
    # Selected separately: PEFT requires every entry of feedforward_modules to be an entry of target_modules.
    inputs = shortest_suffixes(names, [target.name for target in layers.values() if target.feedforward])
    outputs = shortest_suffixes(names, [target.name for target in layers.values() if not target.feedforward])
    targets = sorted([*outputs, *inputs])
    if form == "EXPERTS":
        inputs += [target.name for target in experts.values() if target.feedforward]
        method: dict[str, Any] = own_config(spec, targets, inputs)
    elif form == "FLORA":
        variant = "residual" if spec.offset else "pure"
        method = {
            "peft_type": "FLORA",
            "r": spec.rank,
            "variant": variant,
            "target_modules": targets,
        }
        if spec.rank_pattern:
            method["rank_pattern"] = dict(spec.rank_pattern)
    elif form == "ADALORA":
        method = _adalora_config(spec, targets, _largest_rank(spec, layers))
    else:
        own = METHODS[spec.method]
        if own.one_rank_in_peft:
            spec = replace(spec, rank=_largest_rank(spec, layers), rank_pattern=())
        method = own.peft_config(spec, targets, inputs)
    if experts:
        method["target_parameters"] = parameter_names(model, experts, prefix)
    task_type = task_type_of(model)
    if head is not None:
        method["modules_to_save"] = [module.rpartition(".")[2] for module in head.modules]
        task_type = TASK_TYPES[head.shape.kind]
    elif spec.pooling is not None:
        task_type = EMBEDDINGS
    return {
        **method,
        "base_model_name_or_path": base.path,
        "revision": base.revision,
        "task_type": task_type,
        "inference_mode": True,
        "fan_in_fan_out": any(target.transposed for target in layers.values()),
    }


def _in_body(prefix: str, names: list[str], layers: Layers) -> tuple[list[str], dict[str, Target]]:
    """Names and layers as the body of a model has them. prefix: of the names of its modules."""
    in_body = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    targets = {}
    for module, target in layers.items():
        targets[module.removeprefix(prefix)] = replace(target, name=target.name.removeprefix(prefix))
    return in_body, targets


def names_in_peft(tensors: Mapping[str, Tensor], model: nn.Module, spec: AdapterSpec) -> dict[str, Tensor]:
    """The tensors of an adapter by their names in PEFT: of embeddings the names in the model's body."""
    if spec.pooling is None:
        return dict(tensors)
    whole = f"{PREFIX}{body_prefix(model)}"
    return {f"{PREFIX}{name.removeprefix(whole)}": tensor for name, tensor in tensors.items()}


def _largest_rank(spec: AdapterSpec, layers: Layers) -> int:
    return max(spec.at(module).rank for module in layers)


def _adalora_config(spec: AdapterSpec, targets: list[str], rank: int) -> dict[str, Any]:
    """PEFT requires a schedule of ranks, which has no meaning after training; this one passes its checks."""
    schedule = {"init_r": rank, "target_r": rank, "tinit": 0, "tfinal": 0, "total_step": 1}
    scale = {"lora_alpha": spec.scaling * rank, "lora_dropout": spec.dropout}
    return {"peft_type": "ADALORA", **schedule, **scale, "bias": "none", "target_modules": targets}


def _padded(tensors: Mapping[str, Tensor], missing: int) -> dict[str, Tensor]:
    """The factors with more ranks, which are 0."""
    padded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        pad = (0, missing) if "_B" in name else (0, 0, 0, missing)
        padded[name] = nn.functional.pad(tensor, pad)
    return padded


def _adalora_tensors(params: Mapping[str, Tensor], scaling: float, rank: int) -> dict[str, Tensor]:
    """An ADALORA has the same rank and scale in every module: missing ranks are 0, and lora_E has what the
    module's scale differs by. scaling: relative to that of adapter_config.json."""
    factors = {"lora_A": params["A"], "lora_B": params["B"]}
    A, B = _padded(factors, rank - len(params["A"])).values()
    E = A.new_full((rank, 1), scaling * (rank + ADALORA_EPSILON) / rank)
    return {"lora_A": A, "lora_B": B, "lora_E": E}


def tensors_of(
    parameters: Mapping[str, Mapping[str, Tensor]], layers: Layers, spec: AdapterSpec, *, form: Form
) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names. parameters: module -> parameter ->
    tensor."""
    if form == "EXPERTS":
        return own_tensors(parameters, spec.method)
    tensors: dict[str, Tensor] = {}
    if has_experts(layers):
        tensors = lora_tensors({name: params for name, params in parameters.items() if layers[name].experts})
    for module, params in parameters.items():
        if layers[module].experts:
            continue
        if form == "FLORA":
            by_suffix: Mapping[str, Tensor] = {"flora_A": params["A"], "flora_B": params["B"]}
        elif form == "ADALORA":
            scaling = spec.at(module).scaling / spec.scaling
            by_suffix = _adalora_tensors(params, scaling, _largest_rank(spec, layers))
        else:
            method = METHODS[spec.method]
            by_suffix = method.peft_tensors(params, spec.at(module), layers[module].feedforward)
            if method.one_rank_in_peft:
                by_suffix = _padded(by_suffix, _largest_rank(spec, layers) - spec.at(module).rank)
        tensors |= {f"{PREFIX}{module}.{suffix}": tensor for suffix, tensor in by_suffix.items()}
    return tensors


def task_type_of(model: Any) -> str | None:
    """PEFT's task type of the model; None for every model that is not a language model of tokens.

    With a task type, PEFT would pass `input_ids` to a speech model and look for the saved head of a
    classifier.
    """
    from transformers.models.auto import modeling_auto as auto

    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    name = model_class(model).__name__
    if name in _class_names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        return "SEQ_2_SEQ_LM"
    remote_class = str((getattr(model.config, "auto_map", None) or {}).get("AutoModelForCausalLM", ""))
    is_remote = remote_class.endswith(f".{name}")
    if (
        name in _class_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        or name.endswith("ForCausalLM")
        or is_remote
    ):
        return "CAUSAL_LM"
    return None


def model_class(model: nn.Module) -> type[nn.Module]:
    """The model's class without the class that FSDP prepends."""
    return next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))


def _class_names(mapping: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names.update([value] if isinstance(value, str) else value)
    return names
