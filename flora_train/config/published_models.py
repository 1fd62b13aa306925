"""Sizes of published base models, from published_models.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

TABLE = Path(__file__).with_name("published_models.yaml")


@dataclass(frozen=True)
class PublishedModel:
    """A model on the hub."""

    name: str
    """On the hub, as its authors write it."""
    parameters: int
    config: Mapping[str, str | int | bool]
    """The values of its config.json that decide its sizes, model_type among them."""


def published_model(name: str) -> PublishedModel | None:
    """The published model of this name, in any case; None if it is not in the table."""
    return _table().get(name.strip().lower())


def published_parameters(name: str) -> int | None:
    """The number of parameters of a published model; None if it is not in the table."""
    model = published_model(name)
    return None if model is None else model.parameters


def published_models() -> list[PublishedModel]:
    """All models of the table."""
    return list(_table().values())


@cache
def _table() -> dict[str, PublishedModel]:
    """Name in lower case -> model."""
    content = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    models = {}
    for first_name, entry in content.items():
        for name in (first_name, *entry.get("same_sizes", ())):
            models[name.lower()] = PublishedModel(name, entry["parameters"], entry["config"])
    return models
