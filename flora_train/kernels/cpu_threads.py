"""Distributes the segments of a batch over CPU threads.

The matmuls of a segment are too small to be shared: threads would wait for each other after every one, and
temporary results would travel between their caches. Therefore one thread computes a whole segment with
buffers of its own.
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

MAX_IMBALANCE = 1.2
"""Load of the busiest thread relative to the mean beyond which segments are divided into parts."""

MAX_PARTS = 8

PADDING = 16
"""Numbers between two rows of a buffer: at a stride of a power of two, all rows would map to the same cache
sets."""


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
    """The distribution of a batch over threads."""

    parts: int
    """Parts of every segment."""
    by_thread: tuple[tuple[Job, ...], ...]


@lru_cache(maxsize=128)
def divide(segments: Segments, threads: int) -> Division:
    """Distribute segments by tokens, the largest first, each to the thread with the least load (Graham's
    rule).

    With fewer segments than threads, one thread gets all of them, and torch parallelises every matmul
    instead.
    """
    not_empty = list(segments)
    if threads == 1 or len(not_empty) < threads:
        jobs = [Job(k, start, end, part=0, parts=1) for k, start, end in not_empty]
        return Division(1, (tuple(jobs),))
    for parts in range(1, MAX_PARTS + 1):
        jobs = []
        for k, start, end in not_empty:
            jobs += [Job(k, start, end, part, parts) for part in range(parts)]
        loads, jobs_of_thread = [0.0] * threads, [list[Job]() for _ in range(threads)]
        for job in sorted(jobs, key=lambda job: job.start - job.end):
            thread = loads.index(min(loads))
            loads[thread] += (job.end - job.start) / parts
            jobs_of_thread[thread].append(job)
        if max(loads) * threads <= MAX_IMBALANCE * sum(loads):
            break
    return Division(parts, tuple(map(tuple, jobs_of_thread)))


def division_for(segments: Segments, device: torch.device) -> Division:
    """The distribution over torch's threads on a CPU; a single thread on other devices."""
    return divide(segments, torch.get_num_threads() if device.type == "cpu" else 1)


def run_jobs(division: Division, work: Callable[[Job], None]) -> None:
    """Call `work` for every job, without recording gradients. Raises what `work` raises.

    Threads run in the caller's inference mode: outside it, they could not write to its tensors.
    """
    is_inference = torch.is_inference_mode_enabled()

    def run(jobs: tuple[Job, ...]) -> None:
        with torch.inference_mode(is_inference), torch.no_grad():
            for job in jobs:
                work(job)

    if len(division.by_thread) == 1:
        run(division.by_thread[0])
        return
    workers = _workers(len(division.by_thread))
    for future in [workers.submit(run, jobs) for jobs in division.by_thread]:
        future.result()


class Scratch(threading.local):
    """Reused matrices of one thread, by name. They hold old values: write before reading."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def matrix(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """A matrix [rows, columns] of `like`'s dtype and device, with PADDING numbers between its rows."""
        (rows, columns), stride = shape, shape[1] + PADDING
        size = rows * stride
        buffer = self.buffers.get(name)
        if (
            buffer is None
            or buffer.numel() < size
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            # A tensor that is created in inference mode could not be written to in training afterwards.
            with torch.inference_mode(mode=False):
                buffer = self.buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(rows, stride)[:, :columns]


SCRATCH = Scratch()
"""One per thread: kernels run in the calling thread and in the workers."""


@lru_cache(maxsize=1)
def _workers(count: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    workers = ThreadPoolExecutor(count, "segments", initializer=_use_one_thread)
    for started in [workers.submit(threading.get_ident) for _ in range(count)]:
        started.result()
    torch.set_num_threads(threads)
    return workers


def _use_one_thread() -> None:
    """Set torch's number of threads in this thread. The first call reads the global number, which would
    replace it later."""
    torch.get_num_threads()
    torch.set_num_threads(1)
