"""Which layers of this model does an adapter attach to?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora_train.adapters.methods import Target
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import choices, did_you_mean, user_error

SPEECH = ("whisper", "speech_to_text", "moonshine")
IA3_BEYOND_PEFT: dict[str, dict[str, list[str]]] = {
    "target_modules": {
        "starcoder2": ["k_proj", "v_proj", "mlp.c_proj"],
        **{key: ["k_proj", "v_proj", "fc2"] for key in SPEECH},
    },
    "feedforward_modules": {"starcoder2": ["mlp.c_proj"], **{key: ["fc2"] for key in SPEECH}},
}
"""Keys, values and the feed-forward output (the IA3 paper's rule) of architectures that PEFT's table lacks."""


def linear_layers(model: Any) -> dict[str, Target]:
    """Every layer that adapters support, by module name; the output head is left out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear) or hasattr(module, "W_q"):  # HQQ's layer is no nn.Linear
            found[name] = Target(name, module.in_features, module.out_features, transposed=False)
        elif isinstance(module, Conv1D):
            found[name] = Target(name, module.nx, module.nf, transposed=True)
    return found


def dense_weight(layer: nn.Module, target: Target) -> Tensor:
    """The frozen weight as [out, in]: a view, whatever the layer's own layout."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if target.transposed else weight


def find_targets(model: nn.Module, spec: AdapterSpec, unusable: Mapping[str, str] = MappingProxyType({})) -> dict[str, Target]:
    """Module name -> Target for one adapter. unusable: layers that are left out, and why (layer_usage.py).

    Raises UserError when a name matches nothing, no supported layer, or only layers that are left out.
    """
    key = f"adapters.{spec.family}"
    available = linear_layers(model)
    if spec.target_modules == "all-linear" or (spec.target_modules == "default" and spec.method != "ia3"):
        chosen = available
    else:
        wanted = _ia3_default(model, "target_modules", key) if spec.target_modules == "default" else spec.target_modules
        chosen = _match(model, available, wanted, f"{key}.target_modules")
        for suffix in wanted if spec.target_modules != "default" else ():
            _check_usable(
                model,
                [name for name in chosen if _ends_with(name, [suffix])],
                unusable,
                f"{key}.target_modules",
                suffix,
            )
    none = next((reason for name, reason in unusable.items() if name in chosen), None)
    chosen = {name: target for name, target in chosen.items() if name not in unusable}
    if spec.parent_module is not None:
        chosen = {name: target for name, target in chosen.items() if spec.parent_module in name.split(".")[:-1]}
        if not chosen:
            parts = sorted({part for name in available for part in name.split(".")[:-1] if not part.isdigit()})
            words = f"no target is below it; there are {choices(parts)}.{did_you_mean(spec.parent_module, parts)}"
            raise user_error(f"{key}.parent_module", spec.parent_module, words)
    if not chosen:
        why = "" if none is None else f" that an adapter can be attached to ({none})"
        raise user_error(
            f"{key}.target_modules",
            spec.target_modules,
            f"{type(model).__name__} has no linear layer to adapt{why}",
        )
    if spec.method != "ia3":
        return chosen
    given = spec.feedforward_modules
    inputs = _ia3_default(model, "feedforward_modules", key) if given is None else given
    feedforward = [name for name in chosen if _ends_with(name, inputs)]
    unmatched = [suffix for suffix in given or () if not any(_ends_with(name, [suffix]) for name in chosen)]
    if unmatched:
        raise user_error(
            f"{key}.feedforward_modules",
            unmatched[0],
            f"matches none of the targets {', '.join(endings(chosen))}",
        )
    return {name: Target(t.name, t.in_features, t.out_features, t.transposed, name in feedforward) for name, t in chosen.items()}


def endings(names: Iterable[str]) -> list[str]:
    """The distinct last words of module names."""
    return sorted({name.rpartition(".")[2] for name in names})


def shortest_suffixes(modules: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """The shortest list of endings that selects exactly `chosen` among all `modules`, as PEFT reads `target_modules`."""
    chosen = set(chosen)
    others = [name for name in modules if name not in chosen]
    taken = {".".join(parts[-n:]) for parts in (name.split(".") for name in others) for n in range(1, len(parts) + 1)}
    suffixes = set()
    for name in chosen:
        parts = name.split(".")
        candidates = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        suffixes.add(next((candidate for candidate in candidates if candidate not in taken), name))
    return sorted(suffixes)


def _ends_with(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _check_usable(model: nn.Module, names: Sequence[str], unusable: Mapping[str, str], key: str, suffix: str) -> None:
    """Raises UserError where a name that was given matches only layers that are left out."""
    if names and all(name in unusable for name in names):
        hint = f"no adapter can be attached to {names[0]} of {type(model).__name__}, which {unusable[names[0]]}: leave it out"
        raise user_error(key, suffix, hint)


def _match(model: nn.Module, available: Mapping[str, Target], wanted: Iterable[str], key: str) -> dict[str, Target]:
    modules = dict(model.named_modules())
    for suffix in wanted:
        hits = [name for name in modules if _ends_with(name, [suffix])]
        usable = [name for name in hits if name in available]
        options = endings(available)
        if not hits:
            raise user_error(
                key,
                suffix,
                f"matches no module of {type(model).__name__}; it has {', '.join(options)}.{did_you_mean(suffix, options)}",
            )
        if len(usable) < len(hits):
            odd = next(name for name in hits if name not in available)
            kind = type(modules[odd]).__name__
            raise user_error(
                key,
                suffix,
                f"matches {odd}, a {kind}; supported are Linear and Conv1D below the output head: {', '.join(options)}",
            )
    return {name: target for name, target in available.items() if _ends_with(name, wanted)}


def _ia3_default(model: nn.Module, which: str, key: str) -> list[str]:
    """PEFT's table, so that an exported adapter means the same there."""
    from peft.utils import constants

    table = {
        **getattr(constants, f"TRANSFORMERS_MODELS_TO_IA3_{which.upper()}_MAPPING"),
        **IA3_BEYOND_PEFT[which],
    }
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if architecture not in table:
        options = ", ".join(endings(linear_layers(model)))
        raise user_error(
            f"{key}.{which}",
            None,
            f"IA3 has no default for architecture {architecture!r}: name some of {options}",
        )
    return list(table[architecture])


def check_base(model: nn.Module) -> torch.device:
    """The one device of the base model; several (device_map) are refused."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise user_error("model", sorted(map(str, devices)), "the base must be on one device")
    return devices.pop()
