"""Paging: moves adapters between host and device when not all of them fit on the device.

The device holds the adapters of this step and the next; all others are stored on the host. The device's
memory for adapters is one arena per plane (values, moments), partitioned into rows: pools of any method and
rank share it, and it is repartitioned when their needs change, so that no memory is lost to gaps. The adapter
whose next use is farthest away is evicted first (Belady, "A study of replacement algorithms for a
virtual-storage computer", 1966); the next uses are known, because the mixture determines every future step.
Copies for the next step overlap with the computation of this one: in a thread on a CPU, on a separate stream
on a GPU if host memory is pinned. Copies from files are waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from flora_train.adapters.host_memory import allocate_host_rows, free_memory
from flora_train.adapters.pool import Pool, numbers_of
from flora_train.config.errors import user_error

NextUse = Callable[[int], float]
"""Adapter id -> the next step that uses it; infinity if none is known."""

OF_FREE_MEMORY = 0.5
"""auto: the share of the device memory that is free after loading the base model; activations need the
rest."""


def _unknown(adapter: int) -> float:
    return inf


@dataclass(frozen=True)
class Paging:
    """Settings of paging."""

    device_slots: int | None
    """Number of largest adapters that the device has room for. None: chosen by free memory."""
    folder: Path | None = None
    """Folder of the files that store the other adapters. None: host memory."""

    def slots_for(self, pools: Sequence[Pool], device: torch.device, dtype: torch.dtype) -> int | None:
        """The number of slots, or None if all adapters of these pools fit. Raises UserError if memory is too
        small."""
        largest = max(pool.row_size for pool in pools)
        total = sum(len(pool.specs) * pool.row_size for pool in pools)
        slots = self.device_slots
        if slots is None and device.type == "cpu":
            _check_memory(dtype.itemsize * numbers_of(pools))
        if slots is None and device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            bytes_per_slot = dtype.itemsize * largest * max(pool.plane_count for pool in pools)
            slots = max(1, int(free_bytes * OF_FREE_MEMORY) // bytes_per_slot)
        if slots is None or slots * largest >= total:
            return None
        return slots


def _check_memory(needed: int) -> None:
    free = free_memory()
    if needed > free:
        gigabytes, available = f"{needed / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"
        sizes = f"{gigabytes} for their weights, gradients and moments, where {available} are free"
        advice = "set it to what one step needs (flora-train plan shows it), and paging.host=disk"
        hint = f"keeps all adapters in memory: {sizes}: {advice}"
        raise user_error("adapters.device_slots", "auto", hint)


@dataclass
class Traffic:
    """Bytes copied to the device and back to the host, and the number of repartitions of the arena."""

    to_device: int = 0
    to_host: int = 0
    repartitions: int = 0


@dataclass(frozen=True)
class _Move:
    pool: Pool
    member: int
    slot: int


class Pager:
    """Moves adapters between host and device. location: adapter id -> its pool and its position there."""

    def __init__(
        self,
        pools: Sequence[Pool],
        location: Sequence[tuple[Pool, int]],
        device_slots: int,
        *,
        folder: Path | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.pools = pools
        self.location = location
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.ids = {(id(pool), member): adapter for adapter, (pool, member) in enumerate(location)}
        self.capacity = device_slots * max(pool.row_size for pool in pools)
        """Numbers per plane on the device."""
        self.device_slots = device_slots
        self.resident: frozenset[int] = frozenset()
        """The adapters in use, which are not evicted."""
        self.traffic = Traffic()
        self._arenas: dict[str, Tensor] = {}
        self._gradients = torch.zeros(self.capacity, dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "pager") if self._stream is None else None
        self._copying: Future[None] | torch.cuda.Event | None = None
        self.add_plane("values")

    def add_plane(self, name: str, pools: Sequence[Pool] | None = None) -> None:
        """Add one number for every parameter of every adapter (of these pools), initially 0."""
        self.flush_to_host()
        pinned = self._stream is not None
        for pool in self.pools if pools is None else pools:
            pool.host[name] = allocate_host_rows(
                len(pool.specs), pool.row_size, self.dtype, pinned=pinned, folder=self.folder
            )
        self._arenas[name] = torch.full((self.capacity,), float("nan"), dtype=self.dtype, device=self.device)
        self._repartition([0] * len(self.pools))

    def check_room(self, adapters: Collection[int], needed_by: str = "a step or batch") -> None:
        """Raises UserError if these adapters do not fit on the device together. needed_by: named in the
        message."""
        size = self._size_of(adapters)
        if size > self.capacity:
            slots = -(-size // max(pool.row_size for pool in self.pools))
            smaller = "make the batch smaller (training.tokens_per_step, evaluation.batch_rows)"
            needs = f"the {len(adapters)} adapters of {needed_by}"
            hint = f"is too small for {needs}: set it to {slots} or more, or {smaller}"
            raise user_error("adapters.device_slots", self.device_slots, hint)

    def blocks(self, adapters: Iterable[int]) -> list[list[int]]:
        """These adapters in their order, split into groups that fit on the device."""
        blocks: list[list[int]] = [[]]
        for adapter in adapters:
            if blocks[-1] and self._size_of([*blocks[-1], adapter]) > self.capacity:
                blocks.append([])
            blocks[-1].append(adapter)
        return blocks

    def make_resident(self, adapters: Collection[int], next_use: NextUse) -> None:
        """Load the adapters of a step; they stay on the device until the next call."""
        self.resident = frozenset()
        self.load(adapters, next_use)
        self.resident = frozenset(adapters)

    def load(self, adapters: Collection[int], next_use: NextUse = _unknown) -> None:
        """Load these adapters beside the resident ones. Raises UserError if they do not fit."""
        if self.resident.issuperset(adapters):
            return  # they are on the device, whatever is being copied for the next step
        self.settle()
        needed = self.resident.union(adapters)
        members_by_pool = self._by_pool(needed)
        if all(pool.slot_of.keys() >= set(members) for pool, members in members_by_pool):
            return
        self.check_room(needed)
        if any(len(members) > len(pool.values) for pool, members in members_by_pool):
            self.flush_to_host()
            rows_needed = {id(pool): len(members) for pool, members in members_by_pool}
            self._repartition([rows_needed.get(id(pool), 0) for pool in self.pools])
        self._move(*self._assign_slots(members_by_pool, next_use, pinned=needed))
        self.settle()

    def prefetch(self, adapters: Collection[int], next_use: NextUse) -> None:
        """Begin to load these adapters for the next step, as far as they fit beside the resident ones."""
        self.settle()
        pinned = self.resident.union(adapters)
        self._move(*self._assign_slots(self._by_pool(adapters), next_use, pinned=pinned))

    def settle(self, for_host: bool = False) -> None:
        """Make later work on the device wait for all copies; for_host: also wait on the host."""
        copying, self._copying = self._copying, None
        if isinstance(copying, Future):
            copying.result()
        elif copying is not None:
            torch.cuda.current_stream(self.device).wait_event(copying)
        if for_host and self._stream is not None:
            self._stream.synchronize()

    def flush_to_host(self) -> None:
        """Write all changed adapters to the host."""
        self.settle()
        to_host: list[_Move] = []
        for pool in self.pools:
            to_host += [_Move(pool, member, pool.slot_of[member]) for member in sorted(pool.changed)]
        self._move(to_host, [])
        self.settle(for_host=True)

    def invalidate(self) -> None:
        """Discard the device's copies: the values on the host are the current ones."""
        self.settle()
        for pool in self.pools:
            pool.slot_of.clear()
            pool.changed.clear()

    def _size_of(self, adapters: Iterable[int]) -> int:
        return sum(self.location[adapter][0].row_size for adapter in adapters)

    def _by_pool(self, adapters: Iterable[int]) -> list[tuple[Pool, list[int]]]:
        members: dict[int, list[int]] = defaultdict(list)
        for adapter in sorted(adapters):
            pool, member = self.location[adapter]
            members[id(pool)].append(member)
        return [(pool, members[id(pool)]) for pool in self.pools if id(pool) in members]

    def _assign_slots(
        self, members_by_pool: Sequence[tuple[Pool, list[int]]], next_use: NextUse, *, pinned: Collection[int]
    ) -> tuple[list[_Move], list[_Move]]:
        """Moves to the host and to the device. Adapters in `pinned` stay.

        Evicts the adapter whose next use is farthest away; skips those that do not fit.
        """
        to_host, to_device = [], []
        for pool, members in members_by_pool:
            missing = [member for member in members if member not in pool.slot_of]
            free = sorted(set(range(len(pool.values))) - set(pool.slot_of.values()), reverse=True)
            evictable = self._evictable(pool, next_use, pinned)
            for member in missing:
                if not free and not evictable:
                    break
                if not free:
                    evicted = evictable.pop()
                    slot = pool.slot_of.pop(evicted)
                    free.append(slot)
                    if evicted in pool.changed:
                        to_host.append(_Move(pool, evicted, slot))
                pool.slot_of[member] = free.pop()
                to_device.append(_Move(pool, member, pool.slot_of[member]))
        return to_host, to_device

    def _evictable(self, pool: Pool, next_use: NextUse, pinned: Collection[int]) -> list[int]:
        """Members of the pool that may be evicted, by next use, farthest last."""
        evictable = [member for member in pool.slot_of if self.ids[id(pool), member] not in pinned]
        evictable.sort(key=lambda member: (next_use(self.ids[id(pool), member]), member))
        return evictable

    def _move(self, to_host: Sequence[_Move], to_device: Sequence[_Move]) -> None:
        for move in to_host:
            move.pool.changed.discard(move.member)
        self.traffic.to_host += sum(_bytes(move.pool) for move in to_host)
        self.traffic.to_device += sum(_bytes(move.pool) for move in to_device)
        if not to_host and not to_device:
            return
        if self._thread is not None:
            self._copying = self._thread.submit(_copy, to_host, to_device)
            return
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            _copy(to_host, to_device)
        self._copying = self._stream.record_event()

    def _repartition(self, needs: Sequence[int]) -> None:
        """Give every pool the rows that it needs at once, and share the rest. All adapters must be on the
        host."""
        self.invalidate()
        self.traffic.repartitions += 1
        sizes = [pool.row_size for pool in self.pools]
        counts = [len(pool.specs) for pool in self.pools]
        rows = partition_rows(self.capacity, sizes, counts, needs=needs)
        start = 0
        for pool, count in zip(self.pools, rows, strict=True):
            end = start + count * pool.row_size
            planes = {name: self._arenas[name][start:end].view(count, pool.row_size) for name in pool.host}
            pool.use_storage(planes, self._gradients[start:end].view(count, pool.row_size))
            start = end


def partition_rows(
    capacity: int, sizes: Sequence[int], counts: Sequence[int], *, needs: Sequence[int]
) -> list[int]:
    """Rows of every pool in an arena of `capacity` numbers.

    sizes: numbers per row; counts: adapters per pool; needs: minimum of rows per pool.
    """
    free = capacity - sum(need * size for need, size in zip(needs, sizes, strict=True))
    not_needed = sum((count - need) * size for count, need, size in zip(counts, needs, sizes, strict=True))
    share = min(1.0, free / not_needed) if not_needed else 0.0
    rows = [need + int(share * (count - need)) for count, need in zip(counts, needs, strict=True)]
    free = capacity - sum(count * size for count, size in zip(rows, sizes, strict=True))
    # Distribute what rounding down left, largest rows first.
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        more = min(counts[i] - rows[i], free // sizes[i])
        rows[i] += more
        free -= more * sizes[i]
    return rows


@torch.no_grad()
def _copy(to_host: Sequence[_Move], to_device: Sequence[_Move]) -> None:
    for move in to_host:
        for name, host in move.pool.host.items():
            host[move.member].copy_(move.pool.planes[name][move.slot], non_blocking=True)
    for move in to_device:
        for name, host in move.pool.host.items():
            move.pool.planes[name][move.slot].copy_(host[move.member], non_blocking=True)


def _bytes(pool: Pool) -> int:
    return sum(rows.element_size() for rows in pool.host.values()) * pool.row_size
