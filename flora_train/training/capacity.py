"""What a run needs of memory and disk, and the setting to change where that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flora_train.adapters.pool import Pool
from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig

FLOAT = 4
"""Bytes of one value of an adapter, of its gradient, its moments and its average."""


@dataclass(frozen=True)
class Capacity:
    """What a run needs, and what is free on this machine. Sizes in bytes."""

    pools: Sequence[Pool]
    largest: int
    """Values of the largest adapter."""
    step_adapters: int
    """The most adapters of one step."""
    step_slots: int
    """The most slots that the adapters of one step fill."""
    slots: int | None
    """Slots on the device. None: for all adapters."""
    base: int
    on_device: int
    """Adapters on the device, with gradients, moments and averages."""
    activations: int
    """Kept for the backward of one micro-batch."""
    free_device: int
    on_host: int
    """Adapters in host memory while they are not on the device; 0 when paging to disk."""
    copies: int
    """Host memory for copies of a checkpoint and of the guard; 0 when paging to disk."""
    free_host: int
    checkpoint: int
    on_disk: int
    """In the run folder, at most."""
    free_disk: int
    pages: int
    """Page files, where paging.folder is on another disk than the run folder; else they are part of
    `on_disk`."""
    free_pages: int
    step_seconds: float
    shared: bool
    """Whether device and host are one memory, as on a CPU."""
    processes: int
    """On one machine. Each needs all of this, except the space on disk."""
    notes: Sequence[str] = ()
    """On the rows, and on keys that are not used."""

    @property
    def host(self) -> int:
        """Host memory of one process, beside that of a device that is the host itself."""
        return self.on_host + self.copies


def check_fits(config: RunConfig, capacity: Capacity) -> None:
    """Raises UserError, naming the setting to change, where the run does not fit."""
    if capacity.slots is not None and capacity.step_slots > capacity.slots:
        hint = (
            f"hold less than the {capacity.step_adapters} adapters of a step need: give "
            f"{capacity.step_slots} or more, "
            "or lower training.tokens_per_step"
        )
        raise user_error("adapters.device_slots", capacity.slots, hint)
    _check_device(config, capacity)
    free_host, free_pages, free_disk = map(
        format_size, (capacity.free_host, capacity.free_pages, capacity.free_disk)
    )
    if not capacity.shared and capacity.host * capacity.processes > capacity.free_host:
        fewer = "" if capacity.on_host else f", with adapters.device_slots={capacity.step_slots}"
        hint = (
            f"needs {format_size(capacity.host)} a process, where {free_host} are free: disk keeps all that "
            f"in files{fewer}"
        )
        raise user_error("paging.host", config.paging.host, hint)
    elsewhere = "are free: choose another place, or free some space"
    if capacity.pages > capacity.free_pages:
        hint = f"needs {format_size(capacity.pages)} for adapters, where {free_pages} {elsewhere}"
        raise user_error("paging.folder", config.paging.folder, hint)
    if capacity.on_disk > capacity.free_disk:
        raise user_error(
            "output_dir",
            config.folder,
            f"needs {format_size(capacity.on_disk)}, where {free_disk} {elsewhere}",
        )


def _check_device(config: RunConfig, capacity: Capacity) -> None:
    """Raises UserError where adapters or activations do not fit beside the base."""
    processes = capacity.processes if capacity.shared else 1
    beside_base = capacity.free_device // processes - capacity.base
    rest = beside_base - capacity.host if capacity.shared else beside_base
    if capacity.on_device > rest:
        planes = max(pool.plane_count for pool in capacity.pools)
        slots = max(0, beside_base - capacity.activations) // (planes * FLOAT * capacity.largest)
        needed, free = format_size(capacity.on_device), format_size(max(0, rest))
        hint = f"needs {needed} in addition to the base, where {free} are free: give {slots}"
        if capacity.shared:
            hint += " and paging.host=disk"
        if slots < capacity.step_slots:
            hint = (
                f"has no room: a step needs {capacity.step_slots} slots, and there is room for {slots}; "
                "lower training.tokens_per_step or the rank"
            )
        raise user_error("adapters.device_slots", config.paging.device_slots, hint)
    rest -= capacity.on_device
    if capacity.activations > rest:
        tokens = int(rest / capacity.activations * config.training.tokens_per_microbatch)
        hint = (
            f"keeps {format_size(capacity.activations)} for the backward, where {format_size(rest)} are "
            f"free: give {tokens}, "
            "or model.gradient_checkpointing=non_reentrant"
        )
        raise user_error("training.tokens_per_microbatch", config.training.tokens_per_microbatch, hint)


def format_size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
