"""How does a CPU work on many adapters at once? Each thread takes whole segments, not a slice of every small matmul.

A segment's matmuls are too small to share: threads would wait for each other after every one of them, and its scratch
would travel between their caches. So a thread computes a segment alone, in a scratch of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flora_train.kernels.segments import Segments

IMBALANCE = 1.2
"""The busiest thread may have so much more than the mean before segments are cut into parts."""

MOST_PARTS = 8


@dataclass(frozen=True)
class Job:
    """Tokens start:end of segment k; part of `parts` equal ranges of output features."""

    k: int
    start: int
    end: int
    part: int
    parts: int

    def rows(self, features: int) -> tuple[int, int]:
        """The range of output features."""
        return features * self.part // self.parts, features * (self.part + 1) // self.parts


@dataclass(frozen=True)
class Division:
    """Who does what: jobs by thread. parts: into how many each segment was cut."""

    parts: int
    by_thread: tuple[tuple[Job, ...], ...]


@lru_cache(maxsize=128)
def divide(segments: Segments, threads: int) -> Division:
    """Segments shared out to threads by tokens, the largest first, each to the thread that has least (Graham's rule).

    With fewer segments than threads one thread gets all, and torch shares every matmul instead.
    """
    held = list(segments)
    if threads == 1 or len(held) < threads:
        return Division(1, (tuple(Job(*segment, 0, 1) for segment in held),))
    for parts in range(1, MOST_PARTS + 1):
        jobs = [Job(k, start, end, part, parts) for k, start, end in held for part in range(parts)]
        loads, lists = [0.0] * threads, [list[Job]() for _ in range(threads)]
        for job in sorted(jobs, key=lambda job: job.start - job.end):
            least = loads.index(min(loads))
            loads[least] += (job.end - job.start) / parts
            lists[least].append(job)
        if max(loads) * threads <= IMBALANCE * sum(loads):
            break
    return Division(parts, tuple(map(tuple, lists)))


def division_for(segments: Segments, device: torch.device) -> Division:
    """How to divide segments here: over torch's threads on a CPU, not at all elsewhere."""
    return divide(segments, torch.get_num_threads() if device.type == "cpu" else 1)


def run_jobs(division: Division, work: Callable[[Job], None]) -> None:
    """Call `work` for every job, without recording gradients. Raises what `work` raises."""

    def share(jobs: tuple[Job, ...]) -> None:
        with torch.no_grad():
            for job in jobs:
                work(job)

    if len(division.by_thread) == 1:
        share(division.by_thread[0])
        return
    workers = _workers(len(division.by_thread))
    for done in [workers.submit(share, jobs) for jobs in division.by_thread]:
        done.result()


class Scratch(threading.local):
    """Matrices that a thread fills again and again, by name. They hold what was there before: write before you read."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def matrix(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A matrix [rows, columns] of `like`'s type and device, whose rows are further apart than they are long: at a power
        of two they would all fall into the same few places of a cache."""
        (rows, columns), stride = shape, shape[1] + PADDING
        size = rows * stride
        kept = self.kept.get(name)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self.kept[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return kept[:size].view(rows, stride)[:, :columns]


PADDING = 16

SCRATCH = Scratch()
"""One per thread: kernels run in the calling thread and in the workers."""


@lru_cache(maxsize=1)
def _workers(count: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(count, "segments", initializer=_compute_alone)
    for ready in [workers.submit(threading.get_ident) for _ in range(count)]:
        ready.result()
    torch.set_num_threads(threads)
    return workers


def _compute_alone() -> None:
    """torch counts threads per thread, once it has looked; a new thread looks at its first parallel call."""
    torch.get_num_threads()
    torch.set_num_threads(1)
