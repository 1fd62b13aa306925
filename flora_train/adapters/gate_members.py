"""Finds and checks the adapters that gates choose from (`over`), before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from flora_train.adapters.init_from import PeftOutline, check_sizes, read_outline, value_of
from flora_train.adapters.peft_config import CONFIG
from flora_train.adapters.routed.folder import is_routed_folder
from flora_train.adapters.spec import AdapterSpec, make_spec, member_spec
from flora_train.adapters.targets import find_targets, linear_layers, shortest_suffixes
from flora_train.config.adapter_schema import AdapterConfig, adapter_name, listed
from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.member_schema import MemberConfig, member_name
from flora_train.config.model_schema import ModelConfig
from flora_train.config.schema import RunConfig
from flora_train.models.base_identity import base_identity
from flora_train.models.base_record import recorded_base, same_model
from flora_train.models.hub_files import adapter_folder
from flora_train.models.loading import empty_model
from flora_train.runtime.manifest import BASE_RECORD

MEMBER_METHODS = ("lora", "flora", "ia3")
METHOD_OF = {"LORA": "lora", "ADALORA": "lora", "HIRA": "flora", "FLORA": "flora", "IA3": "ia3"}
"""PEFT type of a member -> its method."""
LORA_VALUES = ("rank", "rank_pattern", "alpha", "alpha_pattern", "rslora")
VALUES_OF = {
    "lora": LORA_VALUES,
    "flora": ("rank", "rank_pattern", "variant"),
    "ia3": ("feedforward_modules",),
}
"""Method -> keys of a member that are read from its files."""


def resolve_members(
    config: RunConfig, begun: RunConfig | None = None, *, is_finished: bool = False
) -> RunConfig:
    """The configuration with what the adapters are that gates choose from.

    begun: the configuration with which the run began, if it is resumed or extended: its members are kept.
    is_finished: whether that run is finished, so that its adapters can be members of new gates. Raises
    UserError with all members that are missing, damaged, of another base model or not trained yet.
    """
    adapters: dict[str, AdapterConfig] = {}
    problems: list[Problem] = []
    finder: _Finder | None = None
    for family, adapter in config.adapters.items():
        before = begun.adapters.get(family) if begun is not None else None
        adapters[family] = adapter
        if adapter.over is None:
            continue
        if before is not None and before.over == adapter.over:
            adapters[family] = adapter.model_copy(update={"members": before.members})
            continue
        finder = finder or _Finder(config, begun if is_finished else None)
        members: list[MemberConfig] = []
        for source in adapter.over:
            try:
                members.append(finder.find(source, family))
            except UserError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        adapters[family] = adapter.model_copy(update={"members": members})
    if problems:
        raise UserError(*problems)
    return config.model_copy(update={"adapters": adapters})


class _Finder:
    """Finds the members of the gates of a run."""

    def __init__(self, config: RunConfig, finished: RunConfig | None) -> None:
        """finished: the configuration of the finished run that is extended."""
        self.config = config
        self.model = empty_model(config.model)
        self.modules = [name for name, _ in self.model.named_modules() if name]
        self.of_run = _adapters_of(config)
        self.trained = _adapters_of(finished) if finished is not None else {}
        self._check_base = _base_checker(config.model)

    def find(self, source: str, family: str) -> MemberConfig:
        """The member that an entry of `over` names. Raises UserError."""
        key = f"adapters.{family}.over"
        if source in self.of_run:
            return self._of_run(source, key)
        if "/" not in source and not adapter_folder_exists(source):
            hint = "is neither the folder of a PEFT adapter nor an adapter of this run, which has "
            hint += f"{choices(self.of_run)}.{did_you_mean(source, self.of_run)}"
            raise user_error(key, source, hint)
        outline = read_outline(source, key, self.modules)
        method = METHOD_OF.get(outline.peft_type)
        if outline.is_dora or method is None:
            kind = "a DoRA" if outline.is_dora else f"of the PEFT type {outline.peft_type}"
            hint = f"is {kind}, and a gate chooses among adapters of the types {listed(list(METHOD_OF))}"
            raise user_error(key, source, hint)
        self._check_base(outline, key)
        missing = [module for module in outline.shapes if module not in self.modules]
        if missing:
            hint = f"has tensors for {missing[0]}, which {self.config.model.path} lacks: "
            raise user_error(key, source, f"{hint}its base model differs{_trained_on(outline)}")
        unknown = [module for module in outline.shapes if module not in linear_layers(self.model)]
        if unknown:
            hint = f"adapts {unknown[0]}, a layer that no adapter can be attached to here"
            raise user_error(key, source, hint)
        member = self._member(source, method, outline)
        targets = find_targets(self.model, member_spec(family, member))
        check_sizes(outline, targets, key, source=source)
        return member

    def _member(self, source: str, method: str, outline: PeftOutline) -> MemberConfig:
        alone = AdapterConfig(method=method, lr=1.0)
        names = (*VALUES_OF[method], "target_modules")
        values: dict[str, Any] = {name: value_of(name, outline, alone, self.model) for name in names}
        if method == "flora" and values["variant"] is None:
            values["variant"] = "residual"  # which a HIRA is
        return MemberConfig.model_validate(
            {"name": member_name(source), "source": source, "method": method, **values}
        )

    def _of_run(self, name: str, key: str) -> MemberConfig:
        """An adapter of this run, which must have been trained before."""
        if (method := self.of_run[name].method) not in MEMBER_METHODS:
            hint = f"is of method {method}, and a gate chooses among {listed(MEMBER_METHODS)}"
            raise user_error(key, name, hint)
        if name not in self.trained:
            hint = (
                "is an adapter of this run, which is not trained yet: train it first and then extend the run "
                "with this gate and a task for it, or name the folder of a trained adapter"
            )
            raise user_error(key, name, hint)
        spec = self.trained[name]
        targets = find_targets(self.model, spec)
        inputs = [target.name for target in targets.values() if target.feedforward]
        values: dict[str, Any] = {"feedforward_modules": shortest_suffixes(targets, inputs)}
        if spec.method != "ia3":
            values = {"rank": spec.rank, "rank_pattern": dict(spec.rank_pattern) or None}
        if spec.method == "flora":
            values["variant"] = "residual" if spec.offset else "pure"
        if spec.method == "lora":
            values |= {"alpha": spec.alpha, "rslora": spec.rslora}
            values["alpha_pattern"] = dict(spec.alpha_pattern) or None
        values["target_modules"] = shortest_suffixes(self.modules, targets)
        return MemberConfig.model_validate({"name": name, "source": name, "method": spec.method, **values})


def _adapters_of(config: RunConfig) -> dict[str, AdapterSpec]:
    """Adapter name -> what it is."""
    specs: dict[str, AdapterSpec] = {}
    for family, adapter in config.adapters.items():
        for task in adapter.tasks or config.tasks:
            steps = config.training.steps
            specs[adapter_name(task, family)] = make_spec(task, family, adapter, default_steps=steps)
    return specs


def adapter_folder_exists(source: str) -> bool:
    """Whether a folder here holds the files of a PEFT adapter, or of a routed one."""
    try:
        folder = adapter_folder(source)
        return (folder / CONFIG).is_file() or is_routed_folder(folder)
    except (UserError, ValueError, OSError):
        return False


def _base_checker(model: ModelConfig) -> Callable[[PeftOutline, str], None]:
    """A function that raises UserError for an adapter of another base model. Hashes are computed once."""
    identity: list[Mapping[str, str] | None] = []

    def check(outline: PeftOutline, key: str) -> None:
        source = outline.source
        try:
            recorded = recorded_base(adapter_folder(source))
        except (OSError, ValueError) as error:
            hint = f"has a damaged {BASE_RECORD} ({error}): export it again, or remove this file"
            raise user_error(key, source, hint) from error
        if recorded is not None and not identity:
            identity.append(base_identity(model))
        now = identity[0] if identity else None
        if recorded is not None and now is not None:
            if recorded["weights"] != now["weights"]:
                hint = (
                    f"was trained on other weights (SHA-256 {recorded['weights'][:12]}) than those of "
                    f"{model.path} ({now['weights'][:12]}): all members of a gate have the run's base model"
                )
                raise user_error(key, source, hint)
            return
        named = outline.base
        is_other = named is not None and PurePath(named).name != PurePath(model.path).name
        if named is not None and is_other and not same_model(named, model.path):
            hint = (
                f"was trained on the base model {named}, and model.path is {model.path}: all members of a "
                "gate have the run's base model (if it is the same under another name, correct "
                f"base_model_name_or_path in its {CONFIG})"
            )
            raise user_error(key, source, hint)

    return check


def _trained_on(outline: PeftOutline) -> str:
    return f" (it was trained on {outline.base})" if outline.base else ""
