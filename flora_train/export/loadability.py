"""Checks whether plain PEFT loads an exported adapter, on a copy of the model without weights.

The check runs for each method before training and for each folder that is written.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flora_train.adapters.heads import Head, head_model, shapes_of
from flora_train.adapters.methods import METHODS
from flora_train.adapters.peft_config import PeftConfig
from flora_train.adapters.peft_tensors import PREFIX, suffixes_of
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.parts import distinct_parts, parts_of
from flora_train.adapters.spec import AdapterSpec, HeadShape
from flora_train.config.errors import first_line, user_error
from flora_train.export.expert_forms import has_experts, modules_of_parameters, split_targets
from flora_train.export.peft_forms import (
    EMBEDDINGS,
    BaseModel,
    Form,
    Layers,
    config_of,
    model_class,
    names_in_peft,
    tensors_of,
)
from flora_train.models.encoders import body_prefix

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""
IRRELEVANT = ("base_model_name_or_path", "revision", "lora_alpha")
"""Keys of adapter_config.json that do not affect loading. Of a dropout, only whether it is 0 does."""


@dataclass(frozen=True)
class Problem:
    """The reason why plain PEFT does not load an adapter."""

    text: str
    silent: bool
    """Whether PEFT ignores tensors instead of refusing the adapter."""


NO_FORM = Problem(
    "PEFT has no fLoRA and no IA3 on the weights of fused experts (target_parameters), so that this form is "
    "flora_train's own",
    silent=False,
)


@dataclass(frozen=True)
class Written:
    """The form in which adapters are written."""

    form: Form
    problem: Problem | None = None
    """Why plain PEFT does not load this form."""
    avoided: Problem | None = None
    """Why plain PEFT does not load the method's own form, which this one replaces."""


class Loadability:
    """Checks of one model, each done once. If the model's class cannot be built from its configuration, every
    check passes."""

    def __init__(self, model: nn.Module) -> None:
        self.empty_model = _without_weights(model)
        self._model = ref(model)
        self._with_heads: dict[HeadShape, nn.Module] = {}
        self.names: dict[str, None] = {}
        if self.empty_model is not None:
            self.names = dict.fromkeys(name for name, _ in self.empty_model.named_modules())
        self._forms: dict[tuple[Any, ...], Written] = {}
        self._problems: dict[tuple[Any, ...], Problem | None] = {}

    def written(self, layers: Layers, spec: AdapterSpec, head: Head | None = None) -> Written:
        """The form of adapters with these settings on these layers, and with a head like this."""
        positions = [(target.name, target.feedforward) for target in layers.values()]
        patterns = spec.rank_pattern, spec.alpha_pattern
        shape = None if head is None else head.shape
        embeds = spec.pooling is not None
        key = (spec.method, spec.offset, spec.rslora, spec.dropout > 0, patterns, shape, embeds, *positions)
        if key not in self._forms:
            self._forms[key] = self._choose_form(layers, spec, head)
        return self._forms[key]

    def _choose_form(self, layers: Layers, spec: AdapterSpec, head: Head | None) -> Written:
        if has_experts(layers):
            return self._form_on_experts(layers, spec, head)
        problem = self._problem_of_form(layers, spec, "own", head=head)
        if (
            problem is None
            or spec.method != "lora"
            or self._problem_of_form(layers, spec, "ADALORA", head=head) is not None
        ):
            return Written("own", problem)
        return Written("ADALORA", avoided=problem)

    def _form_on_experts(self, layers: Layers, spec: AdapterSpec, head: Head | None) -> Written:
        """Of all methods, PEFT has LoRA alone on the weights of fused experts."""
        if spec.method != "lora":
            return Written("EXPERTS", NO_FORM)
        return Written("own", self._problem_of_form(layers, spec, "own", head=head))

    def _plain_model(self, head: Head | None) -> nn.Module:
        """A copy of the model, without weights, that an adapter with this head is loaded onto."""
        if head is None:
            return copy.deepcopy(self.empty_model)  # type: ignore[return-value]
        model = self._model()
        assert model is not None
        if head.shape not in self._with_heads:
            self._with_heads[head.shape] = head_model(model, head.shape)
        return copy.deepcopy(self._with_heads[head.shape])

    def _problem_of_form(
        self, layers: Layers, spec: AdapterSpec, form: Form, *, head: Head | None
    ) -> Problem | None:
        linear, experts = split_targets(layers)
        modules = linear.keys() | modules_of_parameters(experts)
        if self.empty_model is None or not modules <= self.names.keys():
            return None
        parameters: dict[str, dict[str, Tensor]] = {}
        for module, target in layers.items():
            shapes = METHODS[spec.method].shapes_at(spec.at(module), target)
            parameters[module] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        base = BaseModel("")
        config = config_of(self.empty_model, self.names, layers, spec=spec, base=base, form=form, head=head)
        tensors = tensors_of(parameters, layers, spec, form=form)
        for parameter, shape in shapes_of(head).items():
            tensors[f"{PREFIX}{parameter}"] = torch.empty(shape, device="meta")
        return self._load(config, names_in_peft(tensors, self.empty_model, spec), head)

    def problem_of(self, folder: Path, head: Head | None = None) -> Problem | None:
        """Why plain PEFT does not load the adapter in this folder. None if it does, or if that is unknown.
        head: of an adapter of a label task."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        suffixes = tuple(f".{suffix}" for suffix in suffixes_of(PeftConfig(config)))
        of_head = {f"{PREFIX}{parameter}" for parameter in shapes_of(head)}
        in_layers = shapes.keys() - of_head
        modules = {_without_suffix(name.removeprefix(PREFIX), suffixes) for name in in_layers}
        modules = {module.replace(".base_layer", "") for module in modules}  # nested for several parameters
        if self.empty_model is None:
            return None
        prefix = ""
        if config["task_type"] == EMBEDDINGS:
            prefix = body_prefix(self.empty_model)
        if not {f"{prefix}{module}" for module in modules} <= self.names.keys():
            return None
        relevant = {name: value for name, value in config.items() if name not in IRRELEVANT}
        for name in relevant:
            if "dropout" in name:
                relevant[name] = bool(relevant[name])
        key = (json.dumps(relevant, sort_keys=True), *sorted(shapes.items()))
        if key not in self._problems:
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            self._problems[key] = self._load(config, tensors, head)
        return self._problems[key]

    def _load(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: Head | None
    ) -> Problem | None:
        peft_type = str(config["peft_type"])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model: Any = self._plain_model(head)
                if config["task_type"] == EMBEDDINGS:
                    model = model.base_model
                ignored, created = _load_with_peft(model, config, tensors)
        except NotImplementedError:  # the model needs numbers while it is built: unknown
            return None
        except Exception as error:  # PEFT and torch each raise their own types
            return Problem(f"plain PEFT refuses it as {peft_type}: {first_line(error)}", silent=False)
        if ignored or created:
            example = min(ignored or created).removeprefix(PREFIX)
            counts = f"ignores {len(ignored)} of {len(tensors)} tensors and creates {len(created)} new ones"
            return Problem(
                f"plain PEFT {counts} when it loads it as {peft_type}, such as {example}", silent=True
            )
        return None


def _load_with_peft(
    model: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[set[str], set[str]]:
    """The names of tensors in the file that PEFT ignores, and of tensors that it creates without the file."""
    from peft import PeftConfig as WrittenConfig
    from peft import PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if str(config["peft_type"]) == "FLORA":
        import flora_train.peft_plugin  # noqa: F401  (registers FLORA with peft)
    renames = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    in_file = {_renamed(name, renames): tensor for name, tensor in tensors.items()}
    peft_config = WrittenConfig.from_peft_type(**config)
    model_type: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config["task_type"], PeftModel)
    adapted = model_type(model, peft_config, ADAPTER, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(adapted, in_file, ADAPTER, low_cpu_mem_usage=True)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]
    loaded = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    ignored = {*result.unexpected_keys, *(in_file.keys() - loaded.keys())}
    missing = {name for name in result.missing_keys if prefix in name and ADAPTER in name}
    created = missing | (loaded.keys() - in_file.keys())
    common = in_file.keys() & loaded.keys()
    other_shape = {name for name in common if loaded[name].shape != in_file[name].shape}
    return ignored | other_shape, created


def _without_suffix(name: str, suffixes: Iterable[str]) -> str:
    return next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name)


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    """The name that PEFT gives to the tensor in models whose modules were renamed."""
    for pattern, replacement in renames.items():
        changed, count = re.subn(pattern, replacement, name.removeprefix(PREFIX))
        if count:
            return f"{PREFIX}{changed}"
    return name


def _without_weights(model: nn.Module) -> nn.Module | None:
    """The model before any adapter was attached, on the meta device."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return None
    try:
        with torch.device("meta"):
            return model_class(model)(copy.deepcopy(config))
    except Exception:  # a custom class may need more than a configuration
        return None


_LOADABILITY: WeakKeyDictionary[nn.Module, Loadability] = WeakKeyDictionary()


def loadability_of(model: nn.Module) -> Loadability:
    """The checks of this model, cached for its lifetime."""
    if model not in _LOADABILITY:
        _LOADABILITY[model] = Loadability(model)
    return _LOADABILITY[model]


def notes(model: nn.Module, pools: Iterable[Pool]) -> Iterator[str]:
    """A line for each adapter family that plain PEFT does not load or loads under another type, or if that is
    unknown.

    Raises UserError where plain PEFT would silently ignore tensors and no other form avoids it.
    """
    checks = loadability_of(model)
    if checks.empty_model is None and hasattr(getattr(model, "config", None), "model_type"):
        reason = f"{type(model).__name__} cannot be built from its configuration alone"
        yield f"it is unknown whether plain PEFT loads these adapters: {reason}"
        return
    noted = set()
    for pool in pools:
        for spec in {spec.family: spec for spec in pool.specs}.values():
            for layers, plain, head in _plain_adapters(pool, spec):
                written = checks.written(layers, plain, head)
                if spec.family not in noted and (written.problem or written.avoided):
                    noted.add(spec.family)
                    yield _note(spec.family, written)


def _plain_adapters(pool: Pool, spec: AdapterSpec) -> Iterator[tuple[Layers, AdapterSpec, Head | None]]:
    """Layers, settings and head of what is exported of an adapter as PEFT folders of its own: of a routed one
    one part of each kind."""
    if not spec.is_routed:
        yield pool.targets, spec, pool.head
        return
    for part in distinct_parts(parts_of(pool, spec)):
        yield part.targets, part.spec, None


def log_notes(model: nn.Module, pools: Iterable[Pool]) -> None:
    """Log `notes`. Raises UserError as they do."""
    for note in notes(model, pools):
        logger.warning(note)


def _note(family: str, written: Written) -> str:
    if written.avoided is not None:
        return f"{family}: {written.avoided.text}; it is exported as an equal ADALORA, which plain PEFT loads"
    assert written.problem is not None
    key = f"adapters.{family}.target_modules"
    if written.problem.silent:
        raise user_error(key, None, f"{written.problem.text}: choose other layers")
    if written.form == "EXPERTS":
        key = f"adapters.{family}.target_parameters"
    advice = f"use it with flora-train or export it --as merged, or choose other layers in {key}"
    return f"{family}: {written.problem.text}; {advice}"
