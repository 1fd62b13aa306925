"""flora-train plan: prints the memory, disk and time that a run needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console

from flora_train.adapters.host_memory import free_memory
from flora_train.adapters.layer_usage import describe_left_out, unusable_by_shape
from flora_train.adapters.paging import OF_FREE_MEMORY
from flora_train.adapters.pool import Pool, build_pools, numbers_of
from flora_train.adapters.spec import expand
from flora_train.commands.plan_federated import plan_federated
from flora_train.commands.plan_gpus import print_report
from flora_train.commands.plan_sizes import missing_here, print_from_sizes
from flora_train.commands.plan_text import LONG, existing_folder, plan_lines, print_lines, print_notes
from flora_train.config.errors import UserError
from flora_train.config.schema import RunConfig
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.audio.speech_processor import SpeechProcessor
from flora_train.data.task import Task, label_names, notes_on_rows
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.answers.figures import check_metrics
from flora_train.evaluation.answers.prompts import answered_tasks, check_answered
from flora_train.evaluation.code.evaluate import load_suites, prompts_of
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.figures.own_labels import check_label_metrics
from flora_train.evaluation.figures.selection import selections_of
from flora_train.evaluation.generation import check_prompts
from flora_train.export.loadability import notes
from flora_train.models.loading import empty_model, load_feature_extractor, resolve_dtype
from flora_train.models.model_sizes import model_sizes
from flora_train.models.probe_inputs import count_tokens, noise_features
from flora_train.models.speech_encoder import is_speech_model
from flora_train.run_context import load_data, paging_of, prepare, resolve_config
from flora_train.runtime.environment import default_device
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.capacity import FLOAT, Capacity, check_fits
from flora_train.training.fsdp import largest_part
from flora_train.training.gpu_memory import base_bytes
from flora_train.training.step_cost import adapters_of_steps, cost_of_a_step, step_slots

logger = logging.getLogger(__name__)


def plan_run(config: RunConfig) -> None:
    """Print the plan of a run. Raises UserError, which names the setting to change, where the run would be
    refused or not fit.

    Where the model or the rows are not on this machine, the plan follows from the model's sizes alone and is
    about other machines: nothing is downloaded, and the memory of this machine is not checked. GPUs that are
    not here are also planned for a run that does not fit here or takes long.
    """
    folder = RunFolder(Path(config.folder))
    config = resolve_config(config, folder)
    if config.federated is not None:
        plan_federated(config, folder)
        folder.status(config)
        return
    console = Console(soft_wrap=True)
    with model_sizes(config.model) as sizes:
        planned = config.model_copy(update={"model": sizes.config})
        if reasons := missing_here(planned, sizes):
            print_from_sizes(
                console,
                planned,
                sizes=sizes,
                reasons=reasons,
                pools_of=pools_of,
                storage_of=lambda planned, pools: _storage(planned, pools, paged=False),
            )
            folder.status(config)
            return
        with _loaded(planned) as data:
            capacity = _capacity(planned, data)
            print_lines(console, plan_lines(planned, capacity, data.tasks))
            model = empty_model(planned.model)
            print_notes(console, notes(model, capacity.pools))
            try:
                check_fits(planned, capacity)
                is_long = capacity.step_seconds * planned.training.steps > LONG
            except UserError:
                _print_other_gpus(console, planned, capacity.pools, data.tasks)
                raise
            if is_long:
                _print_other_gpus(console, planned, capacity.pools, data.tasks)
        folder.status(config)


def _print_other_gpus(
    console: Console, config: RunConfig, pools: Sequence[Pool], tasks: Mapping[str, Task]
) -> None:
    """What the run would take on GPUs, unless this machine has one."""
    model = empty_model(config.model)
    if default_device().type != "cuda":
        print_report(console, config, model, pools=pools, tasks=tasks)


@dataclass(frozen=True)
class _Data:
    """What the run would train on."""

    tasks: Mapping[str, Task]
    pad_token: int
    speech_processor: SpeechProcessor | None


def measure_capacity(config: RunConfig) -> Capacity:
    """Read the data (it is cached, as by the run), and train one step of models of one and two layers with
    random weights."""
    with _loaded(config) as data:
        return _capacity(config, data)


@contextmanager
def _loaded(config: RunConfig) -> Iterator[_Data]:
    """The data of the run."""
    prepare(config, default_device())
    tokenizer, tasks, speech_processor = load_data(config)
    check_texts(config, tokenizer, tasks)
    try:
        yield _Data(tasks, pad_token(tokenizer), speech_processor)
    finally:
        if speech_processor is not None:
            speech_processor.store.close()


def _capacity(config: RunConfig, data: _Data) -> Capacity:
    device, tasks = default_device(), data.tasks
    cost = cost_of_a_step(
        config, device, tasks, pad_token=data.pad_token, speech_processor=data.speech_processor
    )
    pools = pools_of(config, tasks)
    largest = max(pool.row_size for pool in pools)
    values = sum(len(pool.specs) * pool.row_size for pool in pools)
    steps = adapters_of_steps(config, tasks)
    free_device = _free_memory(device)
    base = _base_bytes(config, device)
    planes = max(pool.plane_count for pool in pools)
    bytes_per_slot = planes * FLOAT * largest
    slots = _slots(config, device, free=free_device - base, bytes_per_slot=bytes_per_slot)
    if slots is not None and slots * largest >= values:
        slots = None
    storage = _storage(config, pools, paged=slots is not None)
    on_device = FLOAT * numbers_of(pools) if slots is None else slots * bytes_per_slot
    return Capacity(
        pools=pools,
        largest=largest,
        step_adapters=max(map(len, steps)),
        step_slots=step_slots(pools, steps),
        slots=slots,
        base=base,
        on_device=on_device,
        activations=cost.activations,
        free_device=free_device,
        free_host=free_memory(),
        step_seconds=cost.step_seconds,
        shared=device.type == "cpu",
        processes=config.num_processes or 1,
        notes=[
            *notes_on_rows(tasks, config),
            *notes_on_unused(config.tasks, bool(config.evaluation.problems), selects=config.compares_states),
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
    return int(share * base_bytes(model, itemsize, config.model.quantization))


def _slots(config: RunConfig, device: torch.device, *, free: int, bytes_per_slot: int) -> int | None:
    """Slots of the largest adapter on the device; None: no limit. free: bytes beside the base."""
    if config.paging.device_slots != "auto":
        return config.paging.device_slots
    if device.type == "cuda":
        return max(1, int(free * OF_FREE_MEMORY) // bytes_per_slot)
    return None


def _storage(config: RunConfig, pools: Sequence[Pool], *, paged: bool) -> dict[str, int]:
    """The fields of Capacity on host memory and disks. paged: not all adapters are on the device."""
    values = sum(len(pool.specs) * pool.row_size for pool in pools)
    state = FLOAT * numbers_of(pools, gradients=False)  # no gradient outlives its step
    on_host, copies = 0, state
    if paged:
        on_host = state
    if config.guard.policy != "skip":
        copies += state
    run_folder = existing_folder(Path(config.folder))
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
    storage |= {"on_host": 0, "copies": 0, "free_pages": disk_usage(existing_folder(folder)).free}
    if existing_folder(folder).stat().st_dev != run_folder.stat().st_dev:
        return storage | {"pages": pages}
    return storage | {"on_disk": on_disk + pages}


def check_texts(config: RunConfig, tokenizer: Any, tasks: Mapping[str, Task]) -> None:
    """Raises UserError where a prompt cannot be completed, or leaves no room for its completion, or a metric
    cannot be computed, as the run would."""
    check_metrics(config)
    check_label_metrics(config, tasks)
    selections_of(config, tasks)
    suites: Sequence[Suite] = ()
    if config.evaluation.problems:
        suites, *_ = load_suites(config)
    prompts = prompts_of(config, suites, tokenizer)
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
    check_answered(config, answered_tasks(config, tasks, model, tokenizer), model, tokenizer)


def pools_of(config: RunConfig, tasks: Mapping[str, Task] = MappingProxyType({})) -> list[Pool]:
    """The pools that the run's bank will have, without memory. tasks: where the labels of heads were read
    from their rows."""
    model = empty_model(config.model)
    features = None
    if is_speech_model(model.config):
        features = noise_features(load_feature_extractor(config.model))
    specs = expand(config, label_names(tasks))
    pools, reasons = build_pools(model, specs, unusable_by_shape(config.model, model, features))
    if reasons:
        targets = {name for pool in pools for name in pool.targets}
        logger.warning(f"no adapter is attached to {describe_left_out(reasons, targets)}")
    return pools
