"""flora-train plan: prints the memory, disk and time that a run needs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
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
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.task import notes_on_rows
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.code.evaluate import load_suites, prompts_of
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.generation import check_prompts
from flora_train.export.loadability import notes
from flora_train.models.loading import empty_model, load_feature_extractor, resolve_dtype
from flora_train.models.probe_inputs import count_tokens, noise_features
from flora_train.models.speech_encoder import is_speech_model
from flora_train.run_context import load_data, paging_of, prepare, resolve_config
from flora_train.runtime.environment import default_device
from flora_train.runtime.progress import duration
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.capacity import FLOAT, Capacity, check_fits, format_size
from flora_train.training.fsdp import largest_part
from flora_train.training.step_cost import STEPS_PLANNED, adapters_of_steps, cost_of_a_step

logger = logging.getLogger(__name__)

LONG = 3600.0
"""Seconds of training from which on the plan says how to shorten it."""
QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5}
"""Bytes of one value of a quantised base."""


def plan_run(config: RunConfig) -> None:
    """Print the plan of a run. Raises UserError, which names the setting to change, where the run would be
    refused or not fit."""
    folder = RunFolder(Path(config.folder))
    config = resolve_config(config, folder)
    capacity = measure_capacity(config)
    console = Console(soft_wrap=True)
    for name, value in plan_lines(config, capacity):
        console.print(shown(f"{name:10} {value}"))
    for note in notes(empty_model(config.model), capacity.pools):
        console.print(shown(f"note: {note}"))
    check_fits(config, capacity)
    folder.status(config)


def measure_capacity(config: RunConfig) -> Capacity:
    """Read the data (it is cached, as by the run), and train one step of models of one and two layers with
    random weights."""
    device = default_device()
    prepare(config, device)
    tokenizer, tasks, speech_processor = load_data(config)
    check_texts(config, tokenizer)
    try:
        pad = pad_token(tokenizer)
        cost = cost_of_a_step(config, device, tasks, pad_token=pad, speech_processor=speech_processor)
    finally:
        if speech_processor is not None:
            speech_processor.store.close()
    pools = pools_of(config)
    largest = max(pool.row_size for pool in pools)
    values = sum(len(pool.specs) * pool.row_size for pool in pools)
    value_counts = {spec.name: pool.row_size for pool in pools for spec in pool.specs}
    steps = adapters_of_steps(config, tasks)
    step_values = max(sum(value_counts[name] for name in names) for names in steps)
    free_device = _free_memory(device)
    base = _base_bytes(config, device)
    slots = _slots(config, device, free=free_device - base, largest=largest, values=values)
    storage = _storage(config, values, paged=slots is not None)
    slot_values = values if slots is None else slots * largest
    return Capacity(
        pools=pools,
        largest=largest,
        step_adapters=max(map(len, steps)),
        step_slots=-(-step_values // largest),
        slots=slots,
        base=base,
        on_device=PLANES * FLOAT * slot_values,
        activations=cost.activations,
        free_device=free_device,
        free_host=free_memory(),
        step_seconds=cost.step_seconds,
        shared=device.type == "cpu",
        processes=config.num_processes or 1,
        notes=[
            *notes_on_rows(tasks, config),
            *notes_on_unused(config.tasks, bool(config.evaluation.problems)),
        ],
        **storage,
    )


def _free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type != "cuda":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _base_bytes(config: RunConfig, device: torch.device) -> int:
    """Of the base model, or of the part of it that one process holds."""
    model = empty_model(config.model)
    share = 1.0
    if config.model.fsdp:
        share = largest_part(model, config.num_processes or 1)
    itemsize = resolve_dtype(config.model.dtype, device).itemsize
    value_bytes = QUANTIZED_BYTES.get(config.model.quantization, itemsize)
    return int(share * value_bytes * sum(tensor.numel() for tensor in model.parameters()))


def _slots(config: RunConfig, device: torch.device, *, free: int, largest: int, values: int) -> int | None:
    """Slots of the largest adapter on the device; None where all adapters fit. free: bytes beside the
    base."""
    slots: int | None = None
    if config.paging.device_slots != "auto":
        slots = config.paging.device_slots
    elif device.type == "cuda":
        slots = max(1, int(free * OF_FREE_MEMORY) // (PLANES * FLOAT * largest))
    if slots is not None and slots * largest < values:
        return slots
    return None


def _storage(config: RunConfig, values: int, *, paged: bool) -> dict[str, int]:
    """The fields of Capacity on host memory and disks. values: of all adapters; paged: not all of them are on
    the device."""
    state = FLOAT * (PLANES - 1) * values  # no gradient outlives its step
    on_host, copies = 0, state
    if paged:
        on_host = state
    if config.guard.policy != "skip":
        copies += state
    run_folder = _existing(Path(config.folder))
    on_disk = (config.training.keep_checkpoints + 1) * state + 2 * FLOAT * values
    storage = {
        "on_host": on_host,
        "copies": copies,
        "checkpoint": state,
        "on_disk": on_disk,
        "free_disk": disk_usage(run_folder).free,
        "pages": 0,
        "free_pages": 0,
    }
    folder = paging_of(config).folder
    if not paged or folder is None:
        return storage
    # One process writes checkpoints.
    pages = (config.num_processes or 1) * (on_host + copies - state) + state
    storage |= {"on_host": 0, "copies": 0, "free_pages": disk_usage(_existing(folder)).free}
    if _existing(folder).stat().st_dev != run_folder.stat().st_dev:
        return storage | {"pages": pages}
    return storage | {"on_disk": on_disk + pages}


def check_texts(config: RunConfig, tokenizer: Any) -> None:
    """Raises UserError where a prompt cannot be completed, or leaves no room for its completion, as the run
    would."""
    suites: Sequence[Suite] = ()
    if config.evaluation.problems:
        suites, *_ = load_suites(config)
    prompts = prompts_of(config, suites)
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


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def pools_of(config: RunConfig) -> list[Pool]:
    """The pools that the run's bank will have, without memory."""
    model = empty_model(config.model)
    features = None
    if is_speech_model(model.config):
        features = noise_features(load_feature_extractor(config.model))
    pools, reasons = build_pools(model, expand(config), unusable_by_shape(config.model, model, features))
    if reasons:
        targets = {name for pool in pools for name in pool.targets}
        logger.warning(f"no adapter is attached to {describe_left_out(reasons, targets)}")
    return pools


def plan_lines(config: RunConfig, capacity: Capacity) -> Iterator[tuple[str, str]]:
    """(heading, line) of the plan."""
    yield from (("note", note) for note in capacity.notes)
    for pool in capacity.pools:
        yield "adapters", _pool_line(pool)
    most = ""
    if config.training.steps > STEPS_PLANNED:
        most = f" of the first {STEPS_PLANNED}"
    slots = f"which fill {capacity.step_slots} slots"
    yield "a step", f"at most {capacity.step_adapters} adapters (in any step{most}), {slots}"
    yield "device", _device_line(capacity)
    yield "host", _host_line(config, capacity)
    kept = f"a checkpoint {format_size(capacity.checkpoint)}, {config.training.keep_checkpoints} are kept"
    yield (
        "disk",
        f"{format_size(capacity.on_disk)} at most ({kept}); {format_size(capacity.free_disk)} are free",
    )
    if capacity.pages:
        free = f"{format_size(capacity.free_pages)} are free"
        yield "pages", f"{format_size(capacity.pages)} in {paging_of(config).folder}; {free}"
    seconds = capacity.step_seconds * config.training.steps
    shorter = ""
    if seconds > LONG:
        shorter = "; training.steps and training.tokens_per_step make it shorter"
    steps = f"{config.training.steps} steps {duration(seconds)}"
    yield (
        "time",
        f"about {capacity.step_seconds:.1f}s a step on one process, {steps}, and evaluations{shorter}",
    )


def _pool_line(pool: Pool) -> str:
    families = Counter(spec.family for spec in pool.specs)
    names = " + ".join(f"{count} x {family}" for family, count in families.items())
    if pool.specs[0].rank:
        names += f", rank {pool.specs[0].rank}"
    size = format_size(PLANES * FLOAT * pool.row_size)
    return f"{names}: {pool.row_size:,} numbers each, {size} with gradient and moments"


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
