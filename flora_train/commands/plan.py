"""flora-train plan: what would a run take of memory, disk and time? Measured on one and two layers of its model, before anything is loaded."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

import torch
from rich.console import Console

from flora_train.adapters.host_memory import free_memory
from flora_train.adapters.layer_usage import describe_left_out, unusable_by_shape
from flora_train.adapters.paging import OF_FREE_MEMORY, PLANES
from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.spec import expand
from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.task import notes_on_rows
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.code.evaluate import load_suites, prompts_of
from flora_train.evaluation.generation import check_prompts
from flora_train.export.loadability import notes
from flora_train.models.loading import empty_model, load_feature_extractor, resolve_dtype
from flora_train.models.probe_inputs import count_tokens, noise_features
from flora_train.models.speech_encoder import is_speech_model
from flora_train.run_context import load_data, paging_of, prepare, resolve_config
from flora_train.runtime.environment import default_device
from flora_train.runtime.progress import duration
from flora_train.training.fsdp import largest_part
from flora_train.training.step_cost import STEPS_PLANNED, adapters_of_steps, cost_of_a_step

logger = logging.getLogger(__name__)

FLOAT = 4
"""Bytes of a number of an adapter, and of its gradient and moments."""
LONG = 3600.0
"""Seconds of training from which on the plan says how to shorten it."""
BYTES = {"8bit": 1.0, "4bit": 0.5}
"""Of a number of a quantised base."""


@dataclass(frozen=True)
class Capacity:
    """What a run takes, in bytes and seconds.

    pools: of all adapters; largest: numbers of the largest adapter; step_adapters, step_slots: the most that a step has, and the slots
    that they fill; slots: for which there is room (None: for all); home: of adapters in host memory; copies: that checkpoints and the
    guard take there (both 0 where files hold them); pages: of those files, where they are on a disk of their own; free_device, free_host,
    free_disk, free_pages: what there is now; shared: device and host are one memory, as on a CPU; processes: so many on one machine,
    each with all of this but the disks.
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
    home: int
    copies: int
    free_host: int
    checkpoint: int
    on_disk: int
    free_disk: int
    pages: int
    free_pages: int
    step_seconds: float
    shared: bool
    processes: int
    notes: Sequence[str] = ()
    """On the rows, and on keys that are not used."""

    @property
    def host(self) -> int:
        """Bytes of host memory of one process, beside those of a device that is the host itself."""
        return self.home + self.copies


def plan_run(config: RunConfig) -> None:
    """Print the plan. Raises UserError, naming the setting to change, where the run does not fit."""
    config = resolve_config(config)
    found = capacity(config)
    console = Console(soft_wrap=True)
    for name, value in _lines(config, found):
        console.print(shown(f"{name:10} {value}"))
    for note in notes(empty_model(config.model), found.pools):
        console.print(shown(f"note: {note}"))
    check_fits(config, found)


def capacity(config: RunConfig) -> Capacity:
    """Reads the data (as the run would; it is cached), and trains a step on a model of one and of two layers with random weights."""
    device = default_device()
    prepare(config, device)
    tokenizer, tasks, speech_processor = load_data(config)
    check_texts(config, tokenizer)
    pools = pools_of(config)
    largest = max(pool.row_size for pool in pools)
    everything = sum(len(pool.specs) * pool.row_size for pool in pools)
    size_of = {spec.name: pool.row_size for pool in pools for spec in pool.specs}
    steps = adapters_of_steps(config, tasks)
    free_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    model, processes = empty_model(config.model), config.num_processes or 1
    part = largest_part(model, processes) if config.model.fsdp else 1.0
    size = BYTES.get(config.model.quantization, resolve_dtype(config.model.dtype, device).itemsize)
    base = int(part * size * sum(tensor.numel() for tensor in model.parameters()))
    try:
        pad = pad_token(tokenizer)
        cost = cost_of_a_step(config, device, tasks, pad_token=pad, speech_processor=speech_processor)
    finally:
        if speech_processor is not None:
            speech_processor.store.close()
    slots: int | None = None if config.paging.device_slots == "auto" else config.paging.device_slots
    if slots is None and device.type == "cuda":
        slots = max(1, int((free_device - base) * OF_FREE_MEMORY) // (PLANES * FLOAT * largest))
    if slots is not None and slots * largest >= everything:
        slots = None
    moved = FLOAT * (PLANES - 1) * everything  # no gradient lives longer than a step
    home = 0 if slots is None else moved
    guarded = 0 if config.guard.policy == "skip" else moved
    folder = paging_of(config).folder if home else None
    pages = 0 if folder is None else processes * (home + guarded) + moved  # one process writes checkpoints
    own_disk = folder is not None and _there(folder).stat().st_dev != _there(Path(config.folder)).stat().st_dev
    return Capacity(
        pools=pools,
        largest=largest,
        step_adapters=max(map(len, steps)),
        step_slots=-(-max(sum(size_of[name] for name in names) for names in steps) // largest),
        slots=slots,
        base=base,
        on_device=PLANES * FLOAT * (everything if slots is None else slots * largest),
        activations=cost.activations,
        free_device=free_device,
        home=0 if pages else home,
        copies=0 if pages else moved + guarded,
        free_host=free_memory(),
        checkpoint=moved,
        on_disk=(config.training.keep_checkpoints + 1) * moved + 2 * FLOAT * everything + (0 if own_disk else pages),
        free_disk=disk_usage(_there(Path(config.folder))).free,
        pages=pages if own_disk else 0,
        free_pages=disk_usage(_there(folder)).free if folder is not None else 0,
        step_seconds=cost.step_seconds,
        shared=device.type == "cpu",
        processes=processes,
        notes=[*notes_on_rows(tasks, config), *notes_on_unused(config.tasks, bool(config.evaluation.problems))],
    )


def check_texts(config: RunConfig, tokenizer: Any) -> None:
    """Raises UserError as the run would, if a prompt that will be completed cannot be, or leaves no room for its continuation."""
    prompts = prompts_of(config, load_suites(config)[0] if config.evaluation.problems else ())
    model = empty_model(config.model)
    if prompts and not is_speech_model(model.config):
        check_prompts(
            tokenizer,
            prompts,
            vocabulary=count_tokens(model),
            model=config.model,
            model_config=model.config,
            max_new_tokens=config.evaluation.max_new_tokens,
        )


def _there(place: Path) -> Path:
    """It, or the folder that it will be made in."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def pools_of(config: RunConfig) -> list[Pool]:
    """The pools that the run's bank will have, without memory."""
    model = empty_model(config.model)
    features = None
    if is_speech_model(model.config):
        features = noise_features(load_feature_extractor(config.model))
    pools, reasons = build_pools(model, expand(config), unusable_by_shape(config.model, model, features))
    if reasons:
        logger.warning(
            f"no adapter is attached to {describe_left_out(reasons, {name for pool in pools for name in pool.targets})}"
        )
    return pools


def _lines(config: RunConfig, found: Capacity) -> Iterator[tuple[str, str]]:
    yield from (("note", note) for note in found.notes)
    for pool in found.pools:
        families = Counter(spec.family for spec in pool.specs)
        rank = f", rank {pool.specs[0].rank}" if pool.specs[0].rank else ""
        names = " + ".join(f"{count} x {family}" for family, count in families.items())
        size = PLANES * FLOAT * pool.row_size
        yield "adapters", f"{names}{rank}: {pool.row_size:,} numbers each, {_size(size)} with gradient and moments"
    room = "all adapters" if found.slots is None else f"{found.slots} adapters of the largest kind"
    most = "" if config.training.steps <= STEPS_PLANNED else f" of the first {STEPS_PLANNED}"
    yield "a step", f"at most {found.step_adapters} adapters (in any step{most}), which fill {found.step_slots} slots"
    each = " for each process" if found.processes > 1 else ""
    needed = found.base + found.on_device + found.activations
    yield (
        "device",
        f"{_size(needed)}{each} = base {_size(found.base)} + room for {room} {_size(found.on_device)} + activations of a micro-batch "
        f"{_size(found.activations)}; {_size(found.free_device)} are free",
    )
    copies = "a copy while a checkpoint is written" + (
        "" if config.guard.policy == "skip" else ", and what the guard goes back to"
    )
    others = f", and {_size(found.home)} of adapters that are not on the device" if found.home else ""
    same = "the same memory" if found.shared else f"{_size(found.free_host)} are free"
    if found.host:
        yield "host", f"{_size(found.copies)}{each}: {copies}{others}; {same}"
    else:
        yield "host", f"nothing: adapters that are not on the device are in files, with {copies}"
    yield (
        "disk",
        f"{_size(found.on_disk)} at most (a checkpoint {_size(found.checkpoint)}, {config.training.keep_checkpoints} are kept); {_size(found.free_disk)} are free",
    )
    if found.pages:
        yield "pages", f"{_size(found.pages)} in {paging_of(config).folder}; {_size(found.free_pages)} are free"
    seconds = found.step_seconds * config.training.steps
    shorter = "; training.steps and training.tokens_per_step make it shorter" if seconds > LONG else ""
    steps = f"{config.training.steps} steps {duration(seconds)}"
    yield "time", f"about {found.step_seconds:.1f}s a step on one process, {steps}, and evaluations{shorter}"


def check_fits(config: RunConfig, found: Capacity) -> None:
    """Raises UserError, naming the setting to change, where the run does not fit."""
    if found.slots is not None and found.step_slots > found.slots:
        hint = f"hold less than the {found.step_adapters} adapters of a step need: give {found.step_slots} or more, or lower training.tokens_per_step"
        raise user_error("adapters.device_slots", found.slots, hint)
    processes = found.processes if found.shared else 1
    beside_base = found.free_device // processes - found.base
    rest = beside_base - (found.host if found.shared else 0)
    if found.on_device > rest:
        slots = max(0, beside_base - found.activations) // (PLANES * FLOAT * found.largest)
        hint = f"needs {_size(found.on_device)} beside the base, where {_size(max(0, rest))} are free: give {slots}"
        if found.shared:
            hint += " and paging.host=disk"
        if slots < found.step_slots:
            hint = f"has no room: a step needs {found.step_slots} slots, and there is room for {slots}; lower training.tokens_per_step or the rank"
        raise user_error("adapters.device_slots", config.paging.device_slots, hint)
    if found.activations > rest - found.on_device:
        part = (rest - found.on_device) / found.activations
        hint = (
            f"keeps {_size(found.activations)} for the backward, where {_size(rest - found.on_device)} are free: give "
            f"{int(part * config.training.tokens_per_microbatch)}, or model.gradient_checkpointing=non_reentrant"
        )
        raise user_error("training.tokens_per_microbatch", config.training.tokens_per_microbatch, hint)
    if not found.shared and found.host * found.processes > found.free_host:
        fewer = "" if found.home else f", with adapters.device_slots={found.step_slots}"
        hint = (
            f"needs {_size(found.host)} a process, where {_size(found.free_host)} are free: disk keeps all that in files{fewer}"
        )
        raise user_error("paging.host", config.paging.host, hint)
    if found.pages > found.free_pages:
        hint = f"needs {_size(found.pages)} for adapters, where {_size(found.free_pages)} are free: choose another place, or make room"
        raise user_error("paging.folder", config.paging.folder, hint)
    if found.on_disk > found.free_disk:
        hint = f"needs {_size(found.on_disk)}, where {_size(found.free_disk)} are free: choose another place, or make room"
        raise user_error("output_dir", config.folder, hint)


def _size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
