"""Which adapters are on the device, when not all fit? Those of this step and the next; the others' numbers live on the host.

The device's memory for adapters is one arena a plane (values, moments), cut into rows: pools of any method and rank share it, and
where their needs shift, it is cut anew, so that nothing is lost to gaps. What must leave is what is needed again last (Belady, "A study
of replacement algorithms for a virtual-storage computer", 1966), which is known: the mixture says what every step to come holds.
Copies for the next step are made while this one computes: by a thread on a CPU, on a stream of its own on a GPU, where host memory is
pinned; files are not, so that their copies are waited for there.
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
from flora_train.adapters.pool import Pool
from flora_train.config.errors import user_error

NextUse = Callable[[int], float]
"""Adapter id -> the step that needs it next; infinity: none that is known."""


@dataclass(frozen=True)
class Paging:
    """device_slots: the device has room for so many adapters of the largest kind (None: as many as fit well); folder: where files
    hold the others (None: memory does)."""

    device_slots: int | None
    folder: Path | None = None

    def slots_for(self, pools: Sequence[Pool], device: torch.device, dtype: torch.dtype) -> int | None:
        """How many slots there shall be, or None where all adapters of these pools have room. Raises UserError if memory is short."""
        largest, everything = (
            max(pool.row_size for pool in pools),
            sum(len(pool.specs) * pool.row_size for pool in pools),
        )
        slots = self.device_slots
        needed = PLANES * dtype.itemsize * everything
        if slots is None and device.type == "cpu" and needed > (free := free_memory()):
            hint = (
                f"keeps all adapters in memory: {needed / 1e9:.1f} GB for their weights, gradients and moments, where {free / 1e9:.1f} GB "
                "are free: give what a step needs (flora-train plan says it) and paging.host=disk"
            )
            raise user_error("adapters.device_slots", "auto", hint)
        if slots is None and device.type == "cuda":
            slots = max(
                1,
                int(torch.cuda.mem_get_info(device)[0] * OF_FREE_MEMORY) // (PLANES * dtype.itemsize * largest),
            )
        return None if slots is None or slots * largest >= everything else slots


OF_FREE_MEMORY = 0.5
"""auto: what adapters may take of the memory that is free once the base is loaded; activations need the rest."""
PLANES = 4
"""Weights, gradient, and AdamW's two moments."""


@dataclass
class Traffic:
    """Bytes copied to the device and back to the host, and how often the arena was cut anew."""

    to_device: int = 0
    to_host: int = 0
    repartitions: int = 0


@dataclass(frozen=True)
class _Move:
    pool: Pool
    member: int
    slot: int


class Pager:
    """Moves adapters between host and device. location: adapter id -> its pool and member."""

    def __init__(
        self,
        pools: Sequence[Pool],
        location: Sequence[tuple[Pool, int]],
        device_slots: int,
        folder: Path | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.pools, self.location, self.folder, self.device, self.dtype = (
            pools,
            location,
            folder,
            device,
            dtype,
        )
        self.ids = {(id(pool), member): adapter for adapter, (pool, member) in enumerate(location)}
        self.room = device_slots * max(pool.row_size for pool in pools)
        self.device_slots = device_slots
        self.resident: frozenset[int] = frozenset()
        self.traffic = Traffic()
        self._arenas: dict[str, Tensor] = {}
        self._gradients = torch.zeros(self.room, dtype=dtype, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "pager") if self._stream is None else None
        self._copying: Future[None] | torch.cuda.Event | None = None
        self.add_plane("values")

    def add_plane(self, name: str) -> None:
        """One more number for every number of an adapter; 0 at first."""
        self.flush_to_host()
        for pool in self.pools:
            pool.host[name] = allocate_host_rows(
                len(pool.specs), pool.row_size, self.dtype, self._stream is not None, self.folder
            )
        self._arenas[name] = torch.full((self.room,), float("nan"), dtype=self.dtype, device=self.device)
        self._repartition([0] * len(self.pools))

    def check_room(self, adapters: Collection[int], where: str = "a step or batch") -> None:
        """Raises UserError if these cannot all be on the device at one time."""
        numbers = self._numbers(adapters)
        if numbers > self.room:
            least = -(-numbers // max(pool.row_size for pool in self.pools))
            hint = (
                f"hold less than the {len(adapters)} adapters of {where} need: give {least} or more, or make the batch smaller "
                "(training.tokens_per_step, evaluation.batch_rows)"
            )
            raise user_error("adapters.device_slots", self.device_slots, hint)

    def blocks(self, adapters: Iterable[int]) -> list[list[int]]:
        """These adapters in their order, cut where no more fit on the device at one time."""
        blocks: list[list[int]] = [[]]
        for adapter in adapters:
            if blocks[-1] and self._numbers([*blocks[-1], adapter]) > self.room:
                blocks.append([])
            blocks[-1].append(adapter)
        return blocks

    def make_resident(self, adapters: Collection[int], next_use: NextUse) -> None:
        """Have the adapters of a step on the device, and keep them there until the next call."""
        self.resident = frozenset()
        self.load(adapters, next_use)
        self.resident = frozenset(adapters)

    def load(self, adapters: Collection[int], next_use: NextUse = lambda adapter: inf) -> None:
        """Have all of these on the device, beside those that are kept. Raises UserError if they do not fit."""
        if self.resident.issuperset(adapters):
            return  # they are there, whatever is being copied for the next step
        self.settle()
        together = self.resident.union(adapters)
        wanted = self._by_pool(together)
        if all(member in pool.slot_of for pool, members in wanted for member in members):
            return
        self.check_room(together)
        if any(len(members) > len(pool.values) for pool, members in wanted):
            self.flush_to_host()
            needs = {id(pool): len(members) for pool, members in wanted}
            self._repartition([needs.get(id(pool), 0) for pool in self.pools])
        self._move(*self._choose(wanted, next_use, together))
        self.settle()

    def prefetch(self, adapters: Collection[int], next_use: NextUse) -> None:
        """Begin to have these on the device for the step after this one, as far as they fit beside the adapters in use."""
        self.settle()
        self._move(*self._choose(self._by_pool(adapters), next_use, self.resident.union(adapters)))

    def settle(self, for_host: bool = False) -> None:
        """What computes next on the device finds all copies done; for_host: what reads or writes on the host, too."""
        copying, self._copying = self._copying, None
        if isinstance(copying, Future):
            copying.result()
        elif copying is not None:
            torch.cuda.current_stream(self.device).wait_event(copying)
        if for_host and self._stream is not None:
            self._stream.synchronize()

    def flush_to_host(self) -> None:
        """The numbers at home are those of now, for all adapters."""
        self.settle()
        out = [_Move(pool, member, pool.slot_of[member]) for pool in self.pools for member in sorted(pool.changed)]
        self._move(out, [])
        self.settle(for_host=True)

    def invalidate(self) -> None:
        """What is at home counts: the device's copies are older."""
        self.settle()
        for pool in self.pools:
            pool.slot_of.clear()
            pool.changed.clear()

    def _numbers(self, adapters: Iterable[int]) -> int:
        return sum(self.location[adapter][0].row_size for adapter in adapters)

    def _by_pool(self, adapters: Iterable[int]) -> list[tuple[Pool, list[int]]]:
        members: dict[int, list[int]] = defaultdict(list)
        for adapter in sorted(adapters):
            pool, member = self.location[adapter]
            members[id(pool)].append(member)
        return [(pool, members[id(pool)]) for pool in self.pools if id(pool) in members]

    def _choose(
        self, wanted: Sequence[tuple[Pool, list[int]]], next_use: NextUse, stay: Collection[int]
    ) -> tuple[list[_Move], list[_Move]]:
        """Who leaves and who comes. Of those that may leave, who is needed last goes first; who finds no room is left out."""
        out, into = [], []
        for pool, members in wanted:
            missing = [member for member in members if member not in pool.slot_of]
            free = sorted(set(range(len(pool.values))) - set(pool.slot_of.values()), reverse=True)
            leaving = [member for member in pool.slot_of if self.ids[id(pool), member] not in stay]
            leaving.sort(key=lambda member: (next_use(self.ids[id(pool), member]), member))
            for member in missing:
                if not free and not leaving:
                    break
                if not free:
                    gone = leaving.pop()
                    free.append(pool.slot_of[gone])
                    if gone in pool.changed:
                        out.append(_Move(pool, gone, pool.slot_of[gone]))
                    del pool.slot_of[gone]
                pool.slot_of[member] = free.pop()
                into.append(_Move(pool, member, pool.slot_of[member]))
        return out, into

    def _move(self, out: Sequence[_Move], into: Sequence[_Move]) -> None:
        for move in out:
            move.pool.changed.discard(move.member)
        self.traffic.to_host += sum(_bytes(move.pool) for move in out)
        self.traffic.to_device += sum(_bytes(move.pool) for move in into)
        if not out and not into:
            return
        if self._thread is not None:
            self._copying = self._thread.submit(_copy, out, into)
            return
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            _copy(out, into)
        self._copying = self._stream.record_event()

    def _repartition(self, needs: Sequence[int]) -> None:
        """Give every pool its part of the arena: what it needs at once, the rest by what there is beyond that. All adapters are at
        home then."""
        self.invalidate()
        self.traffic.repartitions += 1
        rows = partition_rows(self.room, [pool.row_size for pool in self.pools], [len(pool.specs) for pool in self.pools], needs)
        start = 0
        for pool, count in zip(self.pools, rows, strict=True):
            end = start + count * pool.row_size
            planes = {name: arena[start:end].view(count, pool.row_size) for name, arena in self._arenas.items()}
            pool.place(planes, self._gradients[start:end].view(count, pool.row_size))
            start = end


def partition_rows(room: int, sizes: Sequence[int], counts: Sequence[int], needs: Sequence[int]) -> list[int]:
    """Rows for every pool in an arena of `room` numbers. sizes: numbers of a row; counts: adapters; needs: rows at least."""
    left = room - sum(need * size for need, size in zip(needs, sizes, strict=True))
    beyond = sum((count - need) * size for count, need, size in zip(counts, needs, sizes, strict=True))
    part = min(1.0, left / beyond) if beyond else 0.0
    rows = [need + int(part * (count - need)) for count, need in zip(counts, needs, strict=True)]
    left = room - sum(count * size for count, size in zip(rows, sizes, strict=True))
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # what rounding left over
        more = min(counts[i] - rows[i], left // sizes[i])
        rows[i], left = rows[i] + more, left - more * sizes[i]
    return rows


@torch.no_grad()
def _copy(out: Sequence[_Move], into: Sequence[_Move]) -> None:
    for move in out:
        for name, home in move.pool.host.items():
            home[move.member].copy_(move.pool.planes[name][move.slot], non_blocking=True)
    for move in into:
        for name, home in move.pool.host.items():
            move.pool.planes[name][move.slot].copy_(home[move.member], non_blocking=True)


def _bytes(pool: Pool) -> int:
    return sum(rows.element_size() for rows in pool.host.values()) * pool.row_size
