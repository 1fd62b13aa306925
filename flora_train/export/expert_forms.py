"""The tensors of adapters on fused experts: a LoRA as PEFT's target_parameters names and shapes them, and
other methods in a form of our own, because PEFT has none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from flora_train.adapters.methods import Target
from flora_train.adapters.peft_tensors import PREFIX
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import shortest_suffixes

OWN_TYPE = "FLORA_TRAIN_EXPERTS"
"""peft_type of adapters that PEFT has no form for, so that PEFT refuses them instead of loading a part."""

Parameters = Mapping[str, Mapping[str, Tensor]]
"""Target -> parameter -> tensor."""


def has_experts(layers: Mapping[str, Target]) -> bool:
    """Whether one of the targets is a weight of fused experts."""
    return any(target.experts for target in layers.values())


def split_targets(layers: Mapping[str, Target]) -> tuple[dict[str, Target], dict[str, Target]]:
    """The linear layers, and the weights of fused experts."""
    linear = {name: target for name, target in layers.items() if not target.experts}
    experts = {name: target for name, target in layers.items() if target.experts}
    return linear, experts


def parameter_names(model: nn.Module, experts: Mapping[str, Target], prefix: str = "") -> list[str]:
    """`target_parameters` of adapter_config.json: the shortest endings that select exactly these parameters.

    prefix: of the names of the model's body, where the adapter is loaded onto that.
    """
    names = [name.replace(".base_layer", "").removeprefix(prefix) for name, _ in model.named_parameters()]
    return shortest_suffixes(names, [target.name for target in experts.values()])


def modules_of_parameters(names: Iterable[str]) -> set[str]:
    """The experts modules that hold these parameters."""
    return {name.rpartition(".")[0] for name in names}


def lora_tensors(parameters: Parameters) -> dict[str, Tensor]:
    """The tensors of a LoRA on fused experts, by PEFT's names.

    parameters: parameter of the model -> A [E, r, in] and B [E, out, r], those of one module in the order in
    which it has them. PEFT stacks A to [E r, in] and B to [out, r E], ranks first, and wraps a module once
    for each parameter: the last is the outermost.
    """
    of_module: dict[str, list[Mapping[str, Tensor]]] = defaultdict(list)
    for name, factors in parameters.items():
        of_module[name.rpartition(".")[0]].append(factors)
    tensors: dict[str, Tensor] = {}
    for module, stacks in of_module.items():
        for depth, factors in enumerate(reversed(stacks)):
            name = f"{PREFIX}{module}{'.base_layer' * depth}"
            tensors[f"{name}.lora_A.weight"] = factors["A"].flatten(0, 1)
            tensors[f"{name}.lora_B.weight"] = factors["B"].permute(1, 2, 0).flatten(1, 2)
    return tensors


def own_config(spec: AdapterSpec, targets: list[str], inputs: list[str]) -> dict[str, Any]:
    """The method's keys of adapter_config.json in our own form."""
    config: dict[str, Any] = {"peft_type": OWN_TYPE, "method": spec.method, "target_modules": targets}
    if spec.method == "ia3":
        return {**config, "feedforward_modules": inputs}
    variant = "residual" if spec.offset else "pure"
    config |= {"r": spec.rank, "variant": variant}
    if spec.rank_pattern:
        config["rank_pattern"] = dict(spec.rank_pattern)
    return config


def own_tensors(parameters: Parameters, method: str) -> dict[str, Tensor]:
    """The tensors of our own form: the parameters as they are, those of experts as [E, ...]."""
    tensors: dict[str, Tensor] = {}
    for name, params in parameters.items():
        tensors |= {f"{PREFIX}{name}.{method}_{param}": tensor for param, tensor in params.items()}
    return tensors
