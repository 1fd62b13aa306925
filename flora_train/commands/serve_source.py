"""Adapters of a run, a folder or a hub repository and their base, read and checked before anything long."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flora_train.adapters.peft_config import PeftConfig, read_config
from flora_train.adapters.spec import expand, rank_text
from flora_train.config.adapter_schema import ROUTED
from flora_train.config.errors import UserError, choices, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.config.paths import exists, find_file
from flora_train.config.schema import RunConfig
from flora_train.runtime.hub_snapshot import pinned_commit
from flora_train.runtime.run_files import RunFiles
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.serving.adapter_files import read_adapter
from flora_train.serving.catalogue import AdapterSource, FolderSource, choose, open_source
from flora_train.serving.vllm_flags import Base

logger = logging.getLogger(__name__)

NO_EXPERTS = "vLLM has no router that chooses their experts for each token"
Run = tuple[RunFolder, RunConfig]
TITLES = {"HIRA": "fLoRA", "FLORA": "fLoRA", "LORA": "LoRA", "ADALORA": "LoRA", "IA3": "IA3"}


@dataclass(frozen=True)
class Served:
    """What is served, as it was found, before anything long."""

    source: AdapterSource
    base: Base
    model: ModelConfig
    """The base as the trainer loads it."""
    run: Run | None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Name -> folder of those that are loaded at once."""
    forms: Mapping[str, str] = field(default_factory=dict)
    """Name -> method and rank."""
    rank: int = 1
    """The largest one, also of those that are loaded later."""
    later: int = 0
    """Number of adapters that are loaded when they are first requested."""


def open_adapters(run: str, base: str | None) -> tuple[AdapterSource, Run | None]:
    """The adapters, and the run if they are a run's. base: a base model that the user names. Raises UserError
    for a run that cannot be served."""
    path = find_file(run)
    files = RunFiles(path)
    if not exists(files.run_json) and not exists(files.config):
        return open_source(run, "run"), None
    folder, config = open_run(path)
    speech = [name for name, task in config.tasks.items() if task.speech is not None]
    if speech:
        names = ", ".join(sorted(speech))
        hint = f"has speech tasks ({names}), and vLLM's plugin serves causal models of text only"
        raise user_error("run", run, hint)
    if all(config.adapters[family].method in ROUTED for family in config.adapters):
        hint = f"has routed adapters only, and {NO_EXPERTS}: use flora-train chat"
        raise user_error("run", run, hint)
    if base is not None:
        raise user_error("--base", base, f"is for adapters without a run; {run} names its base")
    if config.model.quantization != "none":
        hint = (
            f"was trained on a base in {config.model.quantization}, whose adapters vLLM would serve on other "
            "weights: merge them (flora-train export --as merged), or use flora-train chat"
        )
        raise user_error("run", run, hint)
    source = FolderSource(run, folder.adapters)
    if not source.names():
        hint = "has no adapters yet: it did not finish; resume it with resume=true"
        if folder.finished:
            hint = f"has no adapters: its folder adapters/ is empty; flora-train export {run} writes them"
        raise user_error("run", run, hint)
    return source, (folder, config)


def prepare(
    source: AdapterSource,
    run: Run | None,
    names: Sequence[str],
    *,
    base: str | None,
    on_demand: bool,
    allow_different_base: bool,
) -> Served:
    """Read the adapters of these names, or all; with on_demand, none but these. Raises UserError for adapters
    that cannot be served, and HubError."""
    at_once = _chosen(source, run, names)
    if on_demand:
        at_once = list(dict.fromkeys(names))
    folders = {name: source.fetch(name) for name in at_once}
    forms, largest = _read(source, folders, required=names)
    adapters = {name: folders[name].absolute() for name in forms}
    later = 0
    if on_demand:
        later = len(set(source.names()) - set(adapters))
        largest = max([largest, *(source.rank(name) for name in source.names())])
    if run is not None:
        model = _model_of_run(run, allow_different_base)
    else:
        model = _model_of_folders(source, list(adapters) or source.names()[:1], base)
    return Served(source, _base(model), model, run, adapters, forms, largest, later)


def _chosen(source: AdapterSource, run: Run | None, names: Sequence[str]) -> list[str]:
    """Raises UserError for an unknown name, or one of the run whose folder is missing."""
    known = source.names()
    if run is not None:
        for name in names:
            if name in run[1].adapter_names and name not in known:
                hint = (
                    f"has no folder in {source.label}/adapters: flora-train export {source.label} writes it"
                )
                raise user_error("adapter", name, hint)
    if not known:
        hint = "has no adapters that vLLM serves: no folder in it has an adapter_config.json, or it is routed"
        raise user_error("run", source.label, hint)
    return choose(source, names)


def check_routed(config: RunConfig, names: Sequence[str]) -> None:
    """Raises UserError for a routed adapter among the names; warns of those that are left out where no names
    are given."""
    routed = {spec.name: spec.method for spec in expand(config) if spec.is_routed}
    for name in names:
        if name in routed:
            hint = f"is a routed adapter ({routed[name]}), and {NO_EXPERTS}: use flora-train chat"
            raise user_error("adapter", name, hint)
    if routed and not names:
        logger.warning(f"not served: {choices(routed)}: routed adapters, and {NO_EXPERTS}")


def _read(
    source: AdapterSource, folders: Mapping[str, Path], required: Sequence[str]
) -> tuple[dict[str, str], int]:
    """(name -> method and rank, the largest rank) of the adapters that vLLM can serve. Warns of others.

    required: those that must be served. Raises UserError if one of them cannot be, or if none can.
    """
    forms: dict[str, str] = {}
    largest = 1
    refused: list[UserError] = []
    for name, folder in folders.items():
        try:
            adapter = read_adapter(folder, name)
        except UserError as error:
            if name in required:
                raise
            refused.append(error)
            continue
        largest = max(largest, adapter.rank)
        config = read_config(str(folder), "adapter")
        forms[name] = _form(config, adapter.rank)
    if folders and not forms:
        raise UserError(*(problem for refusal in refused for problem in refusal.problems))
    for refusal in refused:
        logger.warning(f"not served: {refusal}")
    return forms, largest


def _form(config: PeftConfig, rank: int) -> str:
    title = TITLES.get(config.peft_type, config.peft_type)
    return title if config.peft_type == "IA3" else f"{title}, rank {rank_text(rank, None)}"


def _model_of_run(run: Run, allow_different_base: bool) -> ModelConfig:
    """Raises UserError if the base is not the one that the run was trained on."""
    from flora_train.run_context import as_it_began, check_base
    from flora_train.training.origin import OriginOptions

    folder, recorded = run
    check_base(folder, recorded, OriginOptions(allow_different_base=allow_different_base))
    return as_it_began(recorded, folder).model


def _model_of_folders(source: AdapterSource, names: Sequence[str], base: str | None) -> ModelConfig:
    """The base of these adapters. Raises UserError where they name none or several."""
    if base is not None:
        return ModelConfig(path=base)
    configs = [read_config(str(source.describe(name)), "adapter") for name in names]
    bases = {config.base_model: config.options.get("revision") for config in configs}
    if len(bases) > 1:
        named = choices(str(path) for path in bases)
        raise user_error("run", source.label, f"has adapters of several base models: {named}")
    path, revision = next(iter(bases.items()))
    if path is None:
        raise user_error("run", source.label, "has adapters that name no base model: give --base MODEL")
    return ModelConfig(path=path, revision=revision if isinstance(revision, str) else None)


def _base(model: ModelConfig) -> Base:
    """The base as vLLM loads it. Raises UserError if it is neither a folder nor a name on the hub."""
    import torch

    from flora_train.models.loading import resolve_dtype
    from flora_train.runtime.environment import default_device

    local = find_file(model.path)
    path, revision = model.path, None
    if exists(local):
        path = str(local)
    elif model.path.count("/") > 1 or model.path.startswith((".", "/", "~")):
        raise user_error("base model", model.path, "there is no such folder: put it there, or give --base")
    else:
        revision = pinned_commit(model.path, model.revision, "model") or model.revision
    dtype = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[
        resolve_dtype(model.dtype, default_device())
    ]
    return Base(path, revision, dtype, model.trust_remote_code)
