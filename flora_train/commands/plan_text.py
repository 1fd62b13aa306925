"""The lines of `flora-train plan` about the run's adapters, and about this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shutil import disk_usage

from rich.console import Console

from flora_train.adapters.pool import Pool
from flora_train.adapters.spec import experts_text, rank_text
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.data.task import Task
from flora_train.run_context import cache_folder, paging_of
from flora_train.runtime.progress import duration
from flora_train.training.capacity import FLOAT, Capacity, format_size
from flora_train.training.step_cost import STEPS_PLANNED

MANY_ROWS = 100_000_000
"""Rows for which the disk that tokens need is told, whatever the data."""
TOKEN_BYTES, ROW_BYTES = 4, 40
"""Bytes on disk of a token, and of a row besides them."""
LONG = 3600.0
"""Seconds of training from which on the plan says how to shorten it."""


def print_lines(console: Console, lines: Iterable[tuple[str, str]]) -> None:
    """Headings, and a line after each."""
    for name, value in lines:
        console.print(shown(f"{name:10} {value}"))


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """What other programs do with the adapters."""
    for note in notes:
        console.print(shown(f"note: {note}"))


def plan_lines(
    config: RunConfig, capacity: Capacity, tasks: Mapping[str, Task] | None = None
) -> Iterator[tuple[str, str]]:
    """(heading, line) of the plan. tasks: for the line on their tokens."""
    yield from (("note", note) for note in capacity.notes)
    yield from adapter_lines(config, capacity.pools, capacity.step_adapters, capacity.step_slots)
    yield "device", _device_line(capacity)
    yield "host", _host_line(config, capacity)
    yield disk_line(config, capacity.checkpoint, capacity.on_disk, free=capacity.free_disk)
    yield from tokens_line(config, tasks or {})
    if capacity.pages:
        free = f"{format_size(capacity.free_pages)} are free"
        yield "pages", f"{format_size(capacity.pages)} in {paging_of(config).folder}; {free}"
    yield "time", time_line(config, capacity.step_seconds)


def adapter_lines(
    config: RunConfig, pools: Sequence[Pool], step_adapters: int, step_slots: int
) -> Iterator[tuple[str, str]]:
    """The adapters of the run, and those of a step."""
    for pool in pools:
        yield "adapters", _pool_line(pool)
    most = ""
    if config.training.steps > STEPS_PLANNED:
        most = f" of the first {STEPS_PLANNED}"
    slots = f"which fill {step_slots} slots"
    yield "a step", f"at most {step_adapters} adapters (in any step{most}), {slots}"


def disk_line(config: RunConfig, checkpoint: int, on_disk: int, *, free: int) -> tuple[str, str]:
    kept = f"a checkpoint {format_size(checkpoint)}, {config.training.keep_checkpoints} are kept"
    return "disk", f"{format_size(on_disk)} at most ({kept}); {format_size(free)} are free"


def tokens_line(config: RunConfig, tasks: Mapping[str, Task]) -> Iterator[tuple[str, str]]:
    """What the tokens of the texts take on disk, here and for many rows of this length; nothing where all
    tasks are of clips."""
    splits = []
    for name, task in tasks.items():
        if config.tasks[name].speech is None:
            splits += [task.train, task.validation]
    rows = sum(split.counts.rows - split.counts.unsampled for split in splits)
    if not rows:
        return
    size, folder = sum(split.nbytes for split in splits), cache_folder()
    many = f"{MANY_ROWS:,} rows of this length need {format_size(size / rows * MANY_ROWS)}"
    free = format_size(disk_usage(existing_folder(folder)).free)
    yield "tokens", f"{format_size(size)} on disk for {rows:,} rows in {folder}; {many}; {free} are free"


def assumed_tokens_line(max_length: int, documents: int) -> tuple[str, str]:
    """The most that tokens take on disk where the rows are not known. documents: of a row."""
    row = documents * (ROW_BYTES + TOKEN_BYTES * max_length)
    most = format_size(row * MANY_ROWS)
    return "tokens", f"at most {format_size(row)} a row on disk: {MANY_ROWS:,} rows need at most {most}"


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def time_line(config: RunConfig, step_seconds: float) -> str:
    """Of the training on this machine."""
    seconds = step_seconds * config.training.steps
    shorter = ""
    if seconds > LONG:
        shorter = "; training.steps and training.tokens_per_step make it shorter"
    steps = f"{config.training.steps} steps {duration(seconds)}"
    return f"about {step_seconds:.1f}s a step on one process, {steps}, and evaluations{shorter}"


def _pool_line(pool: Pool) -> str:
    families = Counter(spec.family for spec in pool.specs)
    names = " + ".join(f"{count} x {family}" for family, count in families.items())
    smallest, largest = pool.ranks
    if largest:
        names += f", rank {rank_text(largest, smallest)}"
    names += experts_text(pool.specs[0])
    size = format_size(pool.plane_count * FLOAT * pool.row_size)
    parts = "gradient and moments"
    if pool.has_averages:
        parts = "gradient, moments and average"
    return f"{names}: {pool.row_size:,} numbers each, {size} with {parts}"


def _device_line(capacity: Capacity) -> str:
    room = "all adapters"
    if capacity.slots is not None:
        room = f"{capacity.slots} adapters of the largest kind"
    each = _each_process(capacity)
    total = format_size(capacity.base + capacity.on_device + capacity.activations)
    adapters = f"room for {room} {format_size(capacity.on_device)}"
    activations = f"activations of a micro-batch {format_size(capacity.activations)}"
    free = f"{format_size(capacity.free_device)} are free"
    return f"{total}{each} = base {format_size(capacity.base)} + {adapters} + {activations}; {free}"


def _each_process(capacity: Capacity) -> str:
    return " for each process" if capacity.processes > 1 else ""


def _host_line(config: RunConfig, capacity: Capacity) -> str:
    copies = "a copy while a checkpoint is written"
    if config.guard.policy != "skip":
        copies += ", and the state that the guard restores"
    if not capacity.host:
        return f"nothing: adapters that are not on the device are in files, with {copies}"
    others, free = "", "the same memory"
    if capacity.on_host:
        others = f", and {format_size(capacity.on_host)} of adapters that are not on the device"
    if not capacity.shared:
        free = f"{format_size(capacity.free_host)} are free"
    return f"{format_size(capacity.copies)}{_each_process(capacity)}: {copies}{others}; {free}"
