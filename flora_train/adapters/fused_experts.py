"""Recognises modules that hold the weights of all experts of a mixture as parameters, [experts, ...], and
selects those that an adapter attaches to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from flora_train.adapters.methods import Target
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.name_patterns import ends_with

DOWN = "down_proj"


@dataclass(frozen=True)
class ExpertLayout:
    """How a module of transformers holds its experts (the keys of its `use_experts_implementation`).

    Mixtral, Qwen-MoE, OLMoE: [E, out, in], gate and up one after the other. GPT-OSS: [E, in, out] with
    biases, gate and up interleaved. Nemotron-H: no gate.
    """

    experts: int
    """E."""
    up: str
    """Parameter of the first product: gate and up together, or up alone."""
    is_transposed: bool
    """Whether weights are [E, in, out]."""
    has_bias: bool
    """Whether each weight has a bias [E, out], named after it."""
    has_gate: bool
    """Whether the module's `_apply_gate` follows the first product, and not its `act_fn` alone."""

    @property
    def weights(self) -> tuple[str, str]:
        """The parameters that adapters can be attached to."""
        return self.up, DOWN

    def targets(self, module: str, experts: nn.Module) -> dict[str, Target]:
        """Parameter name -> Target, of the experts module with this name."""
        targets: dict[str, Target] = {}
        for part in self.weights:
            name = f"{module}.{part}"
            rows, columns = getattr(experts, part).shape[1:]
            if self.is_transposed:
                rows, columns = columns, rows
            targets[name] = Target(name, columns, rows, transposed=self.is_transposed, experts=self.experts)
        return targets


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """The layout of an experts module of transformers; None for every other module, and for experts of
    another layout, such as quantized ones or those that are distributed over processes."""
    experts: Any = module
    needed = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    if not all(hasattr(experts, name) for name in needed):
        return None
    if experts.has_post_expert_norm or getattr(experts, "_is_expert_parallel", False):
        return None
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    parameters = dict(experts.named_parameters(recurse=False))
    weights = [parameters.get(name) for name in (up, DOWN)]
    if any(weight is None or weight.dim() != 3 or not weight.is_floating_point() for weight in weights):
        return None
    if any(_is_packed(weight) for weight in weights if weight is not None):
        return None
    if experts.has_bias and not {f"{up}_bias", f"{DOWN}_bias"} <= parameters.keys():
        return None
    (count, *_), (count_down, *_) = (weight.shape for weight in weights if weight is not None)
    if count != count_down:
        return None
    return ExpertLayout(
        experts=count,
        up=up,
        is_transposed=bool(experts.is_transposed),
        has_bias=bool(experts.has_bias),
        has_gate=bool(experts.has_gate),
    )


def _is_packed(weight: Tensor) -> bool:
    """Whether a weight is quantized, though its dtype may say that it is not."""
    kind = type(weight.data)
    is_bitsandbytes = type(weight).__name__ in ("Params4bit", "Int8Params")
    return weight.element_size() < 2 or is_bitsandbytes or kind.__module__.startswith("torchao.")


def fused_experts(model: nn.Module) -> dict[str, ExpertLayout]:
    """Module name -> layout of all fused experts that adapters support."""
    found: dict[str, ExpertLayout] = {}
    for name, module in model.named_modules():
        layout = layout_of(module)
        if layout is not None and name:
            found[name] = layout
    return found


def expert_targets(model: nn.Module, spec: AdapterSpec, unusable: Mapping[str, str]) -> dict[str, Target]:
    """Parameter name -> Target of the weights that `target_parameters` selects, by name or by its end from a
    dot on, as in PEFT.

    unusable: modules that no adapter can be attached to -> the reason. Raises UserError for an entry that
    selects no parameter, or a parameter that is no weight of fused experts.
    """
    key = f"adapters.{spec.family}.target_parameters"
    available: dict[str, Target] = {}
    for module, layout in fused_experts(model).items():
        available |= layout.targets(module, model.get_submodule(module))
    selected: dict[str, Target] = {}
    for entry in spec.target_parameters:
        for name in _matches(model, entry, key, available=available):
            module = name.rpartition(".")[0]
            if module in unusable:
                hint = f"no adapter can be attached to {name}, whose module {unusable[module]}: remove it"
                raise user_error(key, entry, hint)
            selected[name] = available[name]
    ordered = {name: target for name, target in available.items() if name in selected}
    return _with_sides(ordered, spec) if spec.method == "ia3" else ordered


def _matches(model: nn.Module, entry: str, key: str, *, available: Mapping[str, Target]) -> Iterator[str]:
    """The parameters that an entry selects. Raises UserError where there are none, or others than
    `available`."""
    names = [name for name, _ in model.named_parameters() if ends_with(name, [entry])]
    supported = _options(available)
    if not names:
        hint = f"matches no parameter of {type(model).__name__}, {_what_it_has(supported)}."
        raise user_error(key, entry, hint + did_you_mean(entry, supported))
    for name in names:
        if name not in available:
            raise user_error(key, entry, _why_not(model, name, supported))
        yield name


def _why_not(model: nn.Module, name: str, supported: list[str]) -> str:
    """Why this parameter takes no adapter."""
    module_name, _, part = name.rpartition(".")
    module = model.get_submodule(module_name)
    parameter = module.get_parameter(part)
    if isinstance(parameter, Tensor) and parameter.dim() == 3:
        hint = f"matches {name} of {type(module).__name__}, whose layout of experts is not supported (or is "
        hint += f"quantized); {type(model).__name__} is a model {_what_it_has(supported)}"
        return hint
    hint = f"matches {name}, which is not the weight of fused experts: linear layers are selected with "
    return f"{hint}target_modules; {type(model).__name__} is a model {_what_it_has(supported)}"


def _what_it_has(supported: list[str]) -> str:
    if not supported:
        return "which has no fused experts that adapters support"
    return f"whose experts have {choices(supported)}"


def _options(available: Mapping[str, Target]) -> list[str]:
    """The shortest names by which the weights of experts can be selected."""
    return sorted({".".join(name.split(".")[-2:]) for name in available})


def _with_sides(targets: Mapping[str, Target], spec: AdapterSpec) -> dict[str, Target]:
    """IA3 scales the input of the down projection, which is the feed-forward block's hidden state, and the
    output of others; `feedforward_modules` may select differently."""
    inputs = (DOWN,) if spec.feedforward_modules is None else spec.feedforward_modules
    return {name: replace(target, feedforward=ends_with(name, inputs)) for name, target in targets.items()}
