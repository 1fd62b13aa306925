"""Where do adapters live? On the device as far as there is room, the others on the host."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.errors import fail
from flora_train.config.files import Layer
from flora_train.config.section import PathText, Section


class PagingConfig(Section):
    device_slots: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    """The device has room for so many adapters of the largest kind (weights, gradient, moments), however many there are; those of a
    step must fit. Also written adapters.device_slots. auto: all, on a GPU as many as fit into half of its free memory."""
    host: Literal["memory", "disk"] = "memory"
    """Where the others are: in memory, pinned for a GPU, or in files without a name, which nobody else can write to. In
    files is then, too, the copy of all that a checkpoint takes while it is written, and what the guard goes back to."""
    folder: PathText | None = Field(None, validate_default=True)
    """host=disk: where the files are, best on a disk of this machine. Default: beside the run folder."""

    @field_validator("folder")
    @classmethod
    def _belongs_to_disk(cls, folder: str | None, info: ValidationInfo) -> str | None:
        if folder is not None and info.data.get("host") == "memory":
            raise ValueError("is where host=disk has its files: give both, or remove it")
        return folder


ALIAS = "adapters.device_slots"


def place_device_slots(raw: Layer) -> Layer:
    """A raw configuration with `adapters.device_slots`, which is no adapter, moved to where it belongs.

    Raises UserError if paging.device_slots says something else.
    """
    adapters: Any = raw.get("adapters")
    if not isinstance(adapters, dict) or "device_slots" not in adapters:
        return raw
    slots, paging = adapters["device_slots"], raw.get("paging") or {}
    if isinstance(paging, dict) and paging.get("device_slots", slots) != slots:
        raise fail(ALIAS, slots, f"is {paging['device_slots']!r} as paging.device_slots: they are one setting, give one of them")
    rest = {name: adapter for name, adapter in adapters.items() if name != "device_slots"}
    return {**raw, "adapters": rest, "paging": {**paging, "device_slots": slots} if isinstance(paging, dict) else paging}
