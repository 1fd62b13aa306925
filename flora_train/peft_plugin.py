"""fLoRA as a PEFT method: after `import flora_train.peft_plugin`, plain peft trains, saves and loads
peft_type FLORA.

    from flora_train.peft_plugin import FloraConfig
    config = FloraConfig(r=4, variant="pure", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)

`flora-train export --as flora` writes such folders. `--as peft` writes HIRA, which peft supports without this
module; a pure adapter then needs one more rank. One adapter at a time is active; AdapterBank supports batches
that mix adapters.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flora_train.kernels.flora.reference import modulated_weight

PEFT_TYPE = "FLORA"


@dataclass
class FloraConfig(PeftConfig):
    """Configuration of a fLoRA adapter in PEFT.

    Args:
        r: The rank.
        variant: `pure`: a weight becomes W0 * (B A), as in the paper. `residual`: W0 * (1 + B A).
        target_modules: Suffixes of module names, one regular expression, or "all-linear".
        exclude_modules: Suffixes of module names, or one regular expression, excluded from the targets.
        flora_dropout: Dropout of the layer's input during training.
        fan_in_fan_out: Weights are stored (in, out), as in GPT-2's Conv1D.
        modules_to_save: Modules that are trained and saved completely.
        layers_to_transform: Indices of the layers with adapters. Default: all.
        layers_pattern: Name of the list of layers that `layers_to_transform` refers to.
        rank_pattern: Other ranks for some layers: the end of a module name, or a regular expression -> rank.

    Raises:
        ValueError: A rank is below 1, or the variant is unknown.
    """

    r: int = 4
    variant: Literal["pure", "residual"] = "pure"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    flora_dropout: float = 0.0
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "weights are stored (in, out), as in GPT-2's Conv1D"}
    )
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, PEFT_TYPE)
        for rank in (self.r, *(self.rank_pattern or {}).values()):
            if rank < 1:
                raise ValueError(f"r = {rank}: the rank must be at least 1")
        if self.variant not in ("pure", "residual"):
            raise ValueError(
                f"variant = {self.variant!r}: must be pure, W0 * (B A), or residual, W0 * (1 + B A)"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


class FloraLinear(nn.Module, BaseTunerLayer):
    """A Linear or Conv1D whose weight is modulated.

    The modulated weight is formed in every forward, which is the fastest formulation for one adapter
    (docs/math.md).
    """

    base_layer: Any
    get_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    _move_adapter_to_device_of_base_layer: Any
    adapter_layer_names = ("flora_A", "flora_B")
    other_param_names = ("flora_offset", "flora_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FloraConfig, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        rows, columns = self.base_layer.weight.shape
        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.flora_A, self.flora_B = nn.ParameterDict(), nn.ParameterDict()
        self.flora_dropout = nn.ModuleDict()
        self.flora_offset: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Tensor | None = None
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, rank)

    def update_layer(self, adapter_name: str, config: FloraConfig, rank: int) -> None:
        """Add an adapter that starts as the identity: B A = 1, or 0 for a residual one."""
        A, B = torch.randn(rank, self.in_features), torch.zeros(self.out_features, rank)
        if config.variant == "pure":
            A[0], B[:, 0] = 1.0, 1.0
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5)
        self.flora_A[adapter_name], self.flora_B[adapter_name] = nn.Parameter(A), nn.Parameter(B)
        self.flora_offset[adapter_name] = float(config.variant == "residual")
        self.flora_dropout[adapter_name] = nn.Dropout(config.flora_dropout)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted_weight(self, adapter_name: str) -> Tensor:
        """The modulated weight [out, in], in the dtype of W0. A Conv1D stores W0 as [in, out]."""
        weight = self._weight_before_merge
        if weight is None:
            weight = self.get_base_layer().weight
        dense = weight.T if self.transposed else weight
        A, B = self.flora_A[adapter_name], self.flora_B[adapter_name]
        modulated = modulated_weight(dense.to(A.dtype), A, B, offset=self.flora_offset[adapter_name])
        return modulated.to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises ValueError if more than one fLoRA adapter is active."""
        active = [name for name in self.active_adapters if name in self.flora_A]
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            names = " and ".join(active)
            raise ValueError(
                f"{names} are active, but only one fLoRA adapter can be: call set_adapter with one name"
            )
        weight, bias = self.adapted_weight(active[0]), self.get_base_layer().bias
        x = self.flora_dropout[active[0]](x)
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge one adapter into the base layer. Raises ValueError for several, and with safe_merge for
        NaN."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.flora_A]
        if not names:
            return
        if len(names) > 1 or self.merged:
            all_names = ", ".join([*self.merged_adapters, *names])
            raise ValueError(
                f"{all_names}: only one fLoRA adapter can be merged at a time; unmerge the other first"
            )
        with torch.no_grad():
            merged = self.adapted_weight(names[0])
            if safe_merge and not merged.isfinite().all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken"
                )
            weight = self.get_base_layer().weight
            self._weight_before_merge = weight.detach().clone()
            weight.copy_(merged.T if self.transposed else merged)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Restore the weight of the base layer."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight.data.copy_(self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: `flora-train export --as lora-svd` converts, and reports the error of the approximation."""
        return False


class FloraModel(BaseTuner):
    """A model with fLoRA adapters in PEFT."""

    prefix = "flora_"
    tuner_layer_cls = FloraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: FloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        patterns = peft_config.rank_pattern or {}
        rank = patterns.get(get_pattern_key(list(patterns), current_key), peft_config.r)
        if isinstance(target, FloraLinear):
            target.update_layer(adapter_name, peft_config, rank)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise TypeError(
                f"{current_key} has the type {type(target).__name__}: fLoRA supports Linear and Conv1D"
            )
        layer = FloraLinear(target, adapter_name, peft_config, rank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _register() -> None:
    """Register FLORA with PEFT. PeftType is a closed Enum, so that the member is added in place, as Enum
    itself adds members."""
    if PEFT_TYPE in PeftType._member_map_:
        return
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    type.__setattr__(PeftType, PEFT_TYPE, member)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    PeftType._member_names_.append(PEFT_TYPE)
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=FloraConfig, model_cls=FloraModel)


_register()
