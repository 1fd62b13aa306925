"""What the adapters that a gate chooses from are, as it was read from their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from flora_train.config.base import ConfigModel, PathText, Text


class MemberConfig(ConfigModel):
    """An adapter that a gate chooses from. Set by the program."""

    name: Text
    """Its name, which values of tasks.*.task_id are compared with."""
    source: PathText
    """Its entry in `over`."""
    method: Literal["lora", "flora", "ia3"]
    """Its method."""
    rank: int | None = Field(None, ge=0, le=8192)
    """Its rank, of lora and flora."""
    rank_pattern: dict[Text, Annotated[int, Field(ge=1, le=8192)]] | None = None
    """Its other ranks for some layers."""
    variant: Literal["pure", "residual"] | None = None
    """Its variant, of flora."""
    alpha: float | None = Field(None, gt=0, le=1_000_000)
    """Its alpha, of lora."""
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0, le=1_000_000)]] | None = None
    """Its other alphas for some layers."""
    rslora: bool | None = None
    """Whether its update is scaled by alpha / sqrt(rank)."""
    target_modules: list[Text]
    """Endings of the layers that it adapts."""
    feedforward_modules: list[Text] | None = None
    """Endings of the layers whose input it scales, of ia3."""


def member_name(source: str) -> str:
    """The name of a member: the last part of its folder's path, or the name of the adapter."""
    return PurePath(source).name or source


def check_distinct(sources: Sequence[str]) -> None:
    """Raises ValueError for two members of one name."""
    first: dict[str, str] = {}
    for source in sources:
        name = member_name(source)
        if name not in first:
            first[name] = source
            continue
        if PurePath(first[name]) == PurePath(source):
            raise ValueError(f"has {source} twice: remove one of them")
        hint = f"has two adapters of the name {name}, {first[name]} and {source}: rename one folder"
        raise ValueError(f"{hint}, because tasks.*.task_id names them")
