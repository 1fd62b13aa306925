"""flora-train plan: what would a run take of memory, disk and time? Measured on one and two layers of its model, before anything is loaded."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.base_model import count_layers, empty_model, resolve_dtype, shallow_model
from flora_train.adapters.host_memory import free_memory
from flora_train.adapters.paging import OF_FREE_MEMORY, PLANES
from flora_train.adapters.pool import Pool, pool_key
from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.adapters.targets import find_targets
from flora_train.config.errors import fail
from flora_train.config.schema import RunConfig
from flora_train.data.audio.batch import SpeechCollate
from flora_train.data.batch import collate
from flora_train.data.task import Task
from flora_train.data.tokens import pad_token
from flora_train.session import load_data, prepare
from flora_train.training.plan import StepPlan, plan_step
from flora_train.training.progress import duration
from flora_train.training.run_folder import RunFolder
from flora_train.training.trainer import Trainer

FLOAT = 4
"""Bytes of a number of an adapter, and of its gradient and moments."""
STEPS_SEEN = 200
"""Steps that are looked at for the largest."""


@dataclass(frozen=True)
class Capacity:
    """What a run takes, in bytes and seconds.

    pools: of all adapters; largest: numbers of the largest adapter; step_adapters, step_slots: the most that a step has, and the slots
    that they fill; slots: for which there is room (None: for all); free_device, free_host, free_disk: what there is now.
    """

    pools: Sequence[Pool]
    largest: int
    step_adapters: int
    step_slots: int
    slots: int | None
    base: int
    on_device: int
    activations: int
    free_device: int
    on_host: int
    free_host: int
    checkpoint: int
    on_disk: int
    free_disk: int
    step_seconds: float


def plan_run(config: RunConfig) -> None:
    """Print the plan. Raises UserError, naming the setting to change, where the run does not fit."""
    found = capacity(config)
    console = Console(soft_wrap=True)
    for name, value in _lines(config, found):
        console.print(f"{name:10} {value}", highlight=False)
    check_fits(config, found)


def capacity(config: RunConfig) -> Capacity:
    """Reads the data (as the run would; it is cached), and trains a step on a model of one and of two layers with random weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare(config, device)
    tokenizer, tasks, ears = load_data(config)
    make_batch = collate if ears is None else SpeechCollate(ears.store, config.audio.spec_augment)
    pools = pools_of(config)
    largest = max(pool.row_size for pool in pools)
    everything = sum(len(pool.specs) * pool.row_size for pool in pools)
    size_of = {spec.name: pool.row_size for pool in pools for spec in pool.specs}
    free_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    base = sum(tensor.numel() for tensor in empty_model(config.model).parameters())
    base *= resolve_dtype(config.model.dtype, device).itemsize
    try:
        one, two = (measure(config, layers, device, tasks, pad_token(tokenizer), make_batch) for layers in (1, 2))
    finally:
        if ears is not None:
            ears.store.close()
    more = count_layers(config.model) - 1
    slots: int | None = None if config.paging.device_slots == "auto" else config.paging.device_slots
    if slots is None and device.type == "cuda":
        slots = max(1, int((free_device - base) * OF_FREE_MEMORY) // (PLANES * FLOAT * largest))
    if slots is not None and slots * largest >= everything:
        slots = None
    numbers = everything if slots is None else slots * largest
    moved = FLOAT * (PLANES - 1) * everything  # no gradient lives longer than a step
    home = 0 if slots is None else moved
    pages = home if config.paging.host == "disk" else 0
    return Capacity(
        pools=pools,
        largest=largest,
        step_adapters=max(map(len, one.steps)),
        step_slots=-(-max(sum(size_of[name] for name in names) for names in one.steps) // largest),
        slots=slots,
        base=base,
        on_device=PLANES * FLOAT * numbers,
        activations=one.activations + more * (two.activations - one.activations),
        free_device=free_device,
        on_host=home - pages + moved,
        free_host=free_memory(),
        checkpoint=moved,
        on_disk=(config.training.keep_checkpoints + 1) * moved + 2 * FLOAT * everything + pages,
        free_disk=disk_usage(next(p for p in Path(config.folder).absolute().parents if p.exists())).free,
        step_seconds=one.seconds + more * (two.seconds - one.seconds),
    )


def pools_of(config: RunConfig) -> list[Pool]:
    """The pools that the run's bank will have, without memory."""
    model = empty_model(config.model)
    groups: dict[tuple[object, ...], list[AdapterSpec]] = defaultdict(list)
    for spec in expand(config):
        groups[pool_key(spec)].append(spec)
    return [Pool(specs[0].method, specs, find_targets(model, specs[0])) for specs in groups.values()]


@dataclass(frozen=True)
class Measured:
    """Of a shallow model. steps: the adapters of every step that was looked at; seconds: of a step; activations: bytes that a
    micro-batch keeps for its backward."""

    steps: Sequence[frozenset[str]]
    seconds: float
    activations: int


def measure(
    config: RunConfig, layers: int, device: torch.device, tasks: Mapping[str, Task], pad: int, make_batch: Any
) -> Measured:
    """One micro-batch, the largest of the first steps, forward, backward and update; the best of two after a first."""
    model = shallow_model(config.model, layers, device)
    bank = AdapterBank.attach(model, expand(config), config.seed)
    accelerator = SimpleNamespace(log=lambda *args, **options: None)
    trainer = Trainer(config, model, bank, tasks, pad, RunFolder(Path(config.folder)), accelerator, make_batch)
    model.train()
    steps, largest = [], None
    for number in range(min(config.training.steps, STEPS_SEEN)):
        plan = plan_step(trainer.mixture, number, tasks, bank, config.training.tokens_per_microbatch)
        if plan is None:
            break
        steps.append(frozenset(bank.specs[adapter].name for adapter in plan.label_tokens))
        padded, rows = max(((rows[0].length * len(rows), rows) for rows in plan.microbatches), key=lambda pair: pair[0])
        if largest is None or padded > largest[0]:
            present = {row.adapter for row in rows}
            part = StepPlan((rows,), {a: n for a, n in plan.label_tokens.items() if a in present}, padded, {})
            share = sum(r[0].length * len(r) for r in plan.microbatches) / padded
            largest = padded, part, share
    assert largest is not None
    _, part, share = largest
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        trainer.step(0, part)
    seconds = []
    for number in (1, 2):
        started = time.perf_counter()
        trainer.step(number, part)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    parameters = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *bank.tensors().values()]}
    kept = sum(size for place, size in saved.storages.items() if place not in parameters)
    return Measured(steps, min(seconds) * share, kept)


class _Saved:
    """What autograd keeps for a backward. storages: address -> bytes, each counted once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def _lines(config: RunConfig, found: Capacity) -> Iterator[tuple[str, str]]:
    for pool in found.pools:
        families = Counter(spec.family for spec in pool.specs)
        rank = f", rank {pool.specs[0].rank}" if pool.specs[0].rank else ""
        names = " + ".join(f"{count} x {family}" for family, count in families.items())
        size = PLANES * FLOAT * pool.row_size
        yield "adapters", f"{names}{rank}: {pool.row_size:,} numbers each, {_size(size)} with gradient and moments"
    room = "all adapters" if found.slots is None else f"{found.slots} adapters of the largest kind"
    most = "" if config.training.steps <= STEPS_SEEN else f" of the first {STEPS_SEEN}"
    yield "a step", f"at most {found.step_adapters} adapters (in any step{most}), which fill {found.step_slots} slots"
    needed = found.base + found.on_device + found.activations
    yield (
        "device",
        f"{_size(needed)} = base {_size(found.base)} + room for {room} {_size(found.on_device)} + activations of a micro-batch "
        f"{_size(found.activations)}; {_size(found.free_device)} are free",
    )
    others = "" if found.slots is None or config.paging.host == "disk" else ", and the adapters that are not on the device"
    yield "host", f"{_size(found.on_host)}: a copy while a checkpoint is written{others}; {_size(found.free_host)} are free"
    yield (
        "disk",
        f"{_size(found.on_disk)} at most (a checkpoint {_size(found.checkpoint)}, {config.training.keep_checkpoints} are kept); {_size(found.free_disk)} are free",
    )
    total = duration(found.step_seconds * config.training.steps)
    yield "time", f"about {found.step_seconds:.1f}s a step on one process, {config.training.steps} steps {total}, and evaluations"


def check_fits(config: RunConfig, found: Capacity) -> None:
    """Raises UserError, naming the setting to change, where the run does not fit."""
    if found.slots is not None and found.step_slots > found.slots:
        fix = f"hold less than the {found.step_adapters} adapters of a step need: give {found.step_slots} or more, or lower training.tokens_per_step"
        raise fail("adapters.device_slots", found.slots, fix)
    rest = found.free_device - found.base
    if found.on_device > rest:
        slots = max(0, rest - found.activations) // (PLANES * FLOAT * found.largest)
        fix = f"needs {_size(found.on_device)} beside the base, where {_size(max(0, rest))} are free: give {slots}"
        if slots < found.step_slots:
            fix = f"has no room: a step needs {found.step_slots} slots, and there is room for {slots}; lower training.tokens_per_step or the rank"
        raise fail("adapters.device_slots", config.paging.device_slots, fix)
    if found.activations > rest - found.on_device:
        part = (rest - found.on_device) / found.activations
        fix = (
            f"keeps {_size(found.activations)} for the backward, where {_size(rest - found.on_device)} are free: give "
            f"{int(part * config.training.tokens_per_microbatch)}, or model.gradient_checkpointing=non_reentrant"
        )
        raise fail("training.tokens_per_microbatch", config.training.tokens_per_microbatch, fix)
    if found.on_host > found.free_host:
        fix = f"needs {_size(found.on_host)}, where {_size(found.free_host)} are free: disk keeps adapters in files"
        raise fail("paging.host", config.paging.host, fix)
    if found.on_disk > found.free_disk:
        fix = f"needs {_size(found.on_disk)}, where {_size(found.free_disk)} are free: choose another place, or make room"
        raise fail("output_dir", config.folder, fix)


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
