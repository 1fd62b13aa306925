"""Reads the folder of a routed adapter: PEFT adapters as its parts, its routers, and how tokens are routed.

docs/routed_export.md documents the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from safetensors.torch import load_file
from torch import Tensor

from flora_train.adapters.peft_config import check_harmless
from flora_train.adapters.peft_equivalents import PeftAdapter, as_lora
from flora_train.adapters.peft_tensors import check_tensors, read_files
from flora_train.adapters.routed.expert_names import SHARED, expert_name
from flora_train.config.errors import first_line, user_error
from flora_train.config.json_format import parse_object
from flora_train.config.paths import find_file

FORMAT = 1
"""Version of routing.json."""
ROUTING, ROUTERS, HEAD = "routing.json", "router.safetensors", "head.safetensors"
ExpertMethod = Literal["lora", "flora", "ia3"]
METHOD_OF_TYPE: Mapping[str, ExpertMethod] = {"LORA": "lora", "HIRA": "flora", "IA3": "ia3"}
"""PEFT type of a part -> the method of the experts."""


class RoutingFile(BaseModel):
    """The content of routing.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Literal[1]
    """FORMAT."""
    method: Literal["mixlora", "switch"]
    base_model_name_or_path: str
    revision: str | None = None
    expert: ExpertMethod
    """Method of the experts."""
    experts: int = Field(ge=1, le=1024)
    """Their number."""
    top_k: int = Field(ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    shared: bool
    """Whether there are layers without experts."""
    blocks: list[str] = Field(min_length=1)
    """The modules whose input a router reads."""
    activation: str | None = None
    """Name of the activation of the experts; None: that of the base."""

    @field_validator("top_p")
    @classmethod
    def _belongs_to_mixlora(cls, top_p: float, info: ValidationInfo) -> float:
        if top_p < 1.0 and info.data.get("method") == "switch":
            raise ValueError("has no meaning for method switch")
        return top_p


@dataclass(frozen=True)
class RoutedAdapter:
    """A routed adapter as it was read."""

    source: str
    routing: RoutingFile
    parts: Mapping[str, PeftAdapter]
    """Name of a part -> its configuration and its tensors."""
    routers: Mapping[str, Tensor]
    """Module -> [E, in]."""
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def first(self) -> PeftAdapter:
        """The first expert: the others have the same layers and settings."""
        return self.parts[expert_name(0)]


def is_routed_folder(folder: Path) -> bool:
    """Whether a folder holds a routed adapter that this program wrote."""
    return (folder / ROUTING).is_file()


def read_routed(source: str, key: str) -> RoutedAdapter:
    """The routed adapter in a folder. Raises UserError, naming `key`, where a file is missing or damaged."""
    folder = find_file(source)
    routing = _read_routing(folder, source, key)
    names = [expert_name(expert) for expert in range(routing.experts)]
    if routing.shared:
        names.append(SHARED)
    parts = {name: read_part(folder / name, source, key=key) for name in names}
    routers = _read_tensors(folder / ROUTERS, source, key)
    head = {}
    if (folder / HEAD).is_file():
        head = _read_tensors(folder / HEAD, source, key)
    adapter = RoutedAdapter(source, routing, parts, routers, head)
    check_routed(adapter, key)
    return adapter


def read_part(folder: Path, source: str, *, key: str) -> PeftAdapter:
    """The PEFT adapter of one part. Raises UserError, naming `key`, where it is damaged or of an unknown
    type."""
    config, tensors = read_files(str(folder), key)
    check_harmless(config, source, key)
    check_tensors(config, tensors, str(folder), key=key)
    return as_lora(config, tensors) if config.peft_type == "ADALORA" else (config, tensors)


def check_routed(adapter: RoutedAdapter, key: str) -> None:
    """Raises UserError where the files of a routed adapter do not belong together."""
    routing, source = adapter.routing, adapter.source
    if routing.top_k > routing.experts:
        raise user_error(key, source, f"is damaged: top_k is {routing.top_k} of {routing.experts} experts")
    if set(adapter.routers) != set(routing.blocks):
        raise user_error(key, source, f"is damaged: {ROUTERS} has other modules than {ROUTING} (blocks)")
    for module, router in adapter.routers.items():
        if router.dim() != 2 or len(router) != routing.experts:
            hint = f"is damaged: the router of {module} has shape {tuple(router.shape)}"
            raise user_error(key, source, f"{hint}, and there are {routing.experts} experts")
    first_config, first = adapter.first
    shapes = _shapes(first.items())
    for name, (config, tensors) in adapter.parts.items():
        method = METHOD_OF_TYPE.get(config.peft_type)
        if method != routing.expert or config.is_dora:
            hint = f"is damaged: {name} has the PEFT type {config.peft_type}, and the experts are"
            raise user_error(key, source, f"{hint} {routing.expert}")
        if name != SHARED and _shapes(tensors.items()) != shapes:
            hint = f"is damaged: {name} has other tensors than {expert_name(0)}"
            raise user_error(key, source, hint)
        settings = config.rank, config.alpha, config.rslora
        if settings != (first_config.rank, first_config.alpha, first_config.rslora):
            hint = f"has other settings (rank, alpha) in {name} than in {expert_name(0)}"
            raise user_error(key, source, f"{hint}: all parts of a routed adapter here have the same")


def _shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _read_routing(folder: Path, source: str, key: str) -> RoutingFile:
    try:
        content = (folder / ROUTING).read_bytes()
        _refuse_gate(content, source, key)
        return RoutingFile.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        hint = f"is damaged: {ROUTING}: {where}: {problem['msg']}"
        raise user_error(key, source, hint) from error
    except OSError as error:
        raise user_error(key, source, f"{ROUTING} cannot be read: {first_line(error)}") from error


def _refuse_gate(content: bytes, source: str, key: str) -> None:
    """Raises UserError for the routing.json of a gate: its members may differ in method and shape, and a new
    gate over them needs nothing else of the folder."""
    try:
        routing = parse_object(content)
    except ValueError:
        return
    if routing.get("method") == "meteora":
        members = f"{source.rstrip('/')}/expert_0 and so on"
        hint = "is a gate over adapters (meteora), and no adapter starts from one: set method to meteora, "
        raise user_error(key, source, f"{hint}over to its members, {members}, and remove this key")


def _read_tensors(file: Path, source: str, key: str) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors and the system each raise their own types
        hint = f"is damaged: {file.name} cannot be read: {first_line(error)}"
        raise user_error(key, source, hint) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise user_error(key, source, f"is damaged: {name} in {file.name} holds no finite numbers")
    return tensors
