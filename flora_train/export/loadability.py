"""Tries on the modules of a model, without its weights, whether plain PEFT loads what is exported: before training, and each folder that is written."""

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
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flora_train.adapters.methods import METHODS
from flora_train.adapters.peft_files import PREFIX, SUFFIXES, kind_of
from flora_train.adapters.pool import Pool
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import first_line, user_error
from flora_train.export.peft_forms import Form, Layers, config_of, model_class, tensors_of

logger = logging.getLogger(__name__)

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""
IRRELEVANT = ("base_model_name_or_path", "lora_alpha")
"""Keys that change nothing about how PEFT loads an adapter. Of a dropout, PEFT asks only whether there is one."""


@dataclass(frozen=True)
class Problem:
    """Why plain PEFT does not load an adapter. silent: it leaves tensors out, where it should refuse the adapter."""

    text: str
    silent: bool


@dataclass(frozen=True)
class Written:
    """What adapters of some kind are written as, and what is wrong with that for plain PEFT; avoided: with the form that they would have had."""

    form: Form
    problem: Problem | None = None
    avoided: Problem | None = None


class Loadability:
    """Answers for one model; each question is tried once. Where the model's class cannot be made from its configuration, nothing is known, and
    nothing is said."""

    def __init__(self, model: nn.Module) -> None:
        self.twin = _without_weights(model)
        self.names = {} if self.twin is None else dict.fromkeys(name for name, _ in self.twin.named_modules())
        self._forms: dict[tuple[Any, ...], Written] = {}
        self._tried: dict[tuple[Any, ...], Problem | None] = {}

    def written(self, layers: Layers, spec: AdapterSpec) -> Written:
        """What adapters of these settings on these layers are written as."""
        key = (
            spec.method,
            spec.offset,
            spec.rslora,
            spec.dropout > 0,
            *((target.name, target.feedforward) for target in layers.values()),
        )
        if key not in self._forms:
            self._forms[key] = self._choose(layers, spec)
        return self._forms[key]

    def _choose(self, layers: Layers, spec: AdapterSpec) -> Written:
        problem = self._try(layers, spec, "own")
        if problem is None or spec.method != "lora" or self._try(layers, spec, "ADALORA") is not None:
            return Written("own", problem)
        return Written("ADALORA", avoided=problem)

    def _try(self, layers: Layers, spec: AdapterSpec, form: Form) -> Problem | None:
        if self.twin is None or not layers.keys() <= self.names.keys():
            return None
        rows = {
            module: {name: torch.empty(shape, device="meta") for name, shape in METHODS[spec.method].shapes(spec, target).items()}
            for module, target in layers.items()
        }
        config = config_of(self.twin, self.names, layers, spec, "", form)
        return self._load(config, tensors_of(rows, layers, spec, form))

    def problem_of(self, folder: Path) -> Problem | None:
        """Why plain PEFT does not load the adapter in this folder as it is written. None where it does, or where that is not known."""
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (safetensors has no __iter__)
        endings = tuple(f".{suffix}" for suffix in SUFFIXES[kind_of(config)])
        modules = {_without_ending(name.removeprefix(PREFIX), endings) for name in shapes}
        if self.twin is None or not modules <= self.names.keys():
            return None
        known = {name: bool(value) if "dropout" in name else value for name, value in config.items() if name not in IRRELEVANT}
        key = (json.dumps(known, sort_keys=True), *sorted(shapes.items()))
        if key not in self._tried:
            self._tried[key] = self._load(config, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        return self._tried[key]

    def _load(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Problem | None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                left_out, made = _loaded(copy.deepcopy(self.twin), config, tensors)
        except NotImplementedError:  # a model that wants numbers while it is made: nothing is known
            return None
        except Exception as error:  # PEFT and torch each have their own
            return Problem(f"plain PEFT refuses it as {kind_of(config)}: {first_line(error)}", silent=False)
        if left_out or made:
            example = min(left_out or made).removeprefix(PREFIX)
            counts = f"leaves {len(left_out)} of {len(tensors)} tensors out and makes {len(made)} new ones"
            return Problem(f"plain PEFT {counts} when it loads it as {kind_of(config)}, {example} for one", silent=True)
        return None


def _loaded(model: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """Names of the tensors of the file that PEFT has no place for, and of those that it makes without the file."""
    from peft import PeftConfig, PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    if kind_of(config) == "FLORA":
        import flora_train.peft_plugin  # noqa: F401  (so that peft knows FLORA)
    renames = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    theirs = {_renamed(name, renames): tensor for name, tensor in tensors.items()}
    peft_config = PeftConfig.from_peft_type(**config)
    kind: Any = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config["task_type"], PeftModel)
    adapted = kind(model, peft_config, ADAPTER, low_cpu_mem_usage=True)
    result = set_peft_model_state_dict(adapted, theirs, ADAPTER, low_cpu_mem_usage=True)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]
    found = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    left_out = {*result.unexpected_keys, *(theirs.keys() - found.keys())}
    made = {name for name in result.missing_keys if prefix in name and ADAPTER in name} | (found.keys() - theirs.keys())
    wrong = {name for name, tensor in found.items() if name in theirs and tensor.shape != theirs[name].shape}
    return left_out | wrong, made


def _without_ending(name: str, endings: Iterable[str]) -> str:
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    """As PEFT renames tensors for models whose modules were renamed."""
    for pattern, replacement in renames.items():
        changed, times = re.subn(pattern, replacement, name.removeprefix(PREFIX))
        if times:
            return f"{PREFIX}{changed}"
    return name


def _without_weights(model: nn.Module) -> nn.Module | None:
    """The model before any adapter, on the meta device."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return None
    try:
        with torch.device("meta"):
            return model_class(model)(copy.deepcopy(config))
    except Exception:  # a class of somebody's own may want more than a configuration
        return None


_KNOWN: WeakKeyDictionary[nn.Module, Loadability] = WeakKeyDictionary()


def loadability_of(model: nn.Module) -> Loadability:
    """The answers for this model, kept as long as it lives."""
    if model not in _KNOWN:
        _KNOWN[model] = Loadability(model)
    return _KNOWN[model]


def notes(model: nn.Module, pools: Iterable[Pool]) -> Iterator[str]:
    """A line for every family of adapters that plain PEFT does not load, or loads under another type, or where that is not known. Said
    before training.

    Raises UserError where plain PEFT would leave tensors out without a word and no form helps.
    """
    if loadability_of(model).twin is None and hasattr(getattr(model, "config", None), "model_type"):
        yield f"whether plain PEFT loads these adapters is not known: {type(model).__name__} cannot be made from its configuration alone"
        return
    told = set()
    for pool in pools:
        for spec in {spec.family: spec for spec in pool.specs}.values():
            found = loadability_of(model).written(pool.targets, spec)
            if spec.family not in told and (found.problem or found.avoided):
                told.add(spec.family)
                yield _note(spec.family, found)


def say_what_peft_loads(model: nn.Module, pools: Iterable[Pool]) -> None:
    """Say these notes. Raises as they do."""
    for note in notes(model, pools):
        logger.warning(note)


def _note(family: str, found: Written) -> str:
    if found.avoided is not None:
        return f"{family}: {found.avoided.text}; its folders hold an ADALORA of the same numbers, which plain PEFT loads"
    assert found.problem is not None
    key = f"adapters.{family}.target_modules"
    if found.problem.silent:
        raise user_error(key, None, f"{found.problem.text}: name other layers")
    return f"{family}: {found.problem.text}; train it for use here and for flora-train export --as merged, or name other layers in {key}"
