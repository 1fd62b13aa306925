"""The plan of a run whose model or rows are not on this machine, from the model's published sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.spec import expand
from flora_train.commands.plan_gpus import print_report
from flora_train.commands.plan_text import (
    adapter_lines,
    assumed_tokens_line,
    disk_line,
    print_lines,
    print_notes,
)
from flora_train.config.errors import UserError, user_error
from flora_train.config.preference_schema import PAIRED
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.assumed_rows import TRANSCRIPT_TOKENS, assumed_tasks
from flora_train.data.audio.decode import RATE
from flora_train.data.sources import source_files
from flora_train.evaluation.code.contenders import learnt_tasks
from flora_train.export.loadability import notes
from flora_train.models.context_length import declared_positions
from flora_train.models.loading import check_model_type, empty_model, load_feature_extractor
from flora_train.models.model_sizes import ModelSizes
from flora_train.models.speech_encoder import count_positions, is_speech_model, is_whisper
from flora_train.training.capacity import format_size
from flora_train.training.step_cost import adapters_of_steps, step_slots

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors", "*.bin")
PoolsOf = Callable[[RunConfig], list[Pool]]
Storage = Callable[[RunConfig, list[Pool]], dict[str, int]]


def missing_here(config: RunConfig, sizes: ModelSizes) -> list[str]:
    """What the plan would have to download, one sentence each; empty if it can read and measure everything.

    Raises UserError for local files that are missing.
    """
    reasons = []
    if sizes.is_published:
        parameters = sum(parameter.numel() for parameter in empty_model(config.model).parameters())
        source = "its published sizes are known"
        if sizes.origin == "hub":
            source = "its config.json was read from the hub"
        reasons.append(f"{sizes.name} ({parameters:,} parameters) is not on this machine; {source}")
    elif sizes.origin == "cache" and not _is_complete(Path(config.model.path)):
        reasons.append(f"{sizes.name} is in the hub's cache without tokenizer or weights")
    on_hub, no_release = [], []
    for name in sorted(learnt_tasks(config)):
        task = config.tasks[name]
        sources = {"train": task.train, "validation": task.validation, "test": task.test}
        for split, place in sources.items():
            if place is None:
                continue
            if place.hub is not None:
                on_hub.append(name)
            elif not _has_release(place, f"tasks.{name}.{split}"):
                no_release.append(name)
    if on_hub:
        reasons.append(f"the rows of {_names(on_hub)} are on the hub")
    if no_release:
        reasons.append(f"there is no release with the clips of {_names(no_release)}")
    return reasons


def _is_complete(snapshot: Path) -> bool:
    """Whether a model's folder in the hub's cache has a tokenizer and weights."""
    has_tokenizer = any((snapshot / name).exists() for name in TOKENIZER_FILES)
    return has_tokenizer and any(any(snapshot.glob(pattern)) for pattern in WEIGHT_FILES)


def _has_release(source: SourceConfig, key: str) -> bool:
    """Whether the clips of a source are here. Raises UserError for other local files that are missing."""
    try:
        source_files(source, key)
    except UserError:
        if source.common_voice is None:
            raise
        return False
    return True


def _names(tasks: Sequence[str], limit: int = 9) -> str:
    names = list(dict.fromkeys(tasks))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"


def print_from_sizes(
    console: Console,
    config: RunConfig,
    *,
    sizes: ModelSizes,
    reasons: Sequence[str],
    pools_of: PoolsOf,
    storage_of: Storage,
) -> None:
    """Print what is known without weights and rows.

    pools_of: finds the run's adapters by running a model of this shape; storage_of: host memory and disk for
    the adapters of these pools.
    """
    model: Any = empty_model(config.model)
    check_model_type(model.config, config)
    _check_length(config, sizes, model)
    window = _window(config, model)
    tasks = assumed_tasks(config, window)
    if sizes.origin == "published":
        # Every linear layer of the architectures in the table takes adapters, so that none has to be run.
        pools, _ = build_pools(model, expand(config))
    else:
        pools = pools_of(config)
    steps = adapters_of_steps(config, tasks)
    storage = storage_of(config, pools)
    print_lines(console, (("plan", reason) for reason in (*reasons, "nothing is downloaded")))
    print_lines(console, [("rows", _on_rows(config, window))])
    problems, selects = bool(config.evaluation.problems), config.compares_states
    unused = notes_on_unused(config.tasks, problems, selects=selects)
    print_lines(console, (("note", note) for note in unused))
    print_lines(console, adapter_lines(config, pools, max(map(len, steps)), step_slots(pools, steps)))
    host = f"{format_size(storage['copies'])} a process: a copy while a checkpoint is written"
    disk = disk_line(config, storage["checkpoint"], storage["on_disk"], free=storage["free_disk"])
    print_lines(console, [("host", host), disk])
    if not window:
        print_lines(console, [assumed_tokens_line(config.training.max_length, _documents(config))])
    print_notes(console, notes(model, pools))
    print_report(console, config, model, pools=pools, tasks=tasks)


def _on_rows(config: RunConfig, window: int) -> str:
    if window:
        return f"each clip is counted as {window} encoder positions and {TRANSCRIPT_TOKENS} tokens"
    length = config.training.max_length
    line = f"each is counted as training.max_length = {length} tokens, as packed rows have"
    if any(task.prefers for task in config.tasks.values()):
        line += "; of preferences, one completion is counted, without reference: their steps take longer"
    return line


def _documents(config: RunConfig) -> int:
    """The most documents that a row of a task has: two in a pair."""
    return max(2 if task.objective in PAIRED or task.chosen else 1 for task in config.tasks.values())


def _window(config: RunConfig, model: nn.Module) -> int:
    """Encoder positions of the longest clip; 0 for text."""
    settings: Any = model.config
    if not is_speech_model(settings):
        return 0
    if is_whisper(settings):
        return int(settings.max_source_positions)
    positions = count_positions(model, load_feature_extractor(config.model))
    return positions(int(config.audio.max_seconds * RATE))


def _check_length(config: RunConfig, sizes: ModelSizes, model: nn.Module) -> None:
    """Raises UserError where an example can be longer than the model's positions."""
    settings: Any = model.config
    positions = declared_positions(settings)
    if positions is not None and config.training.max_length > positions:
        hint = f"is more than the {positions} positions of {sizes.name}: give at most {positions}"
        raise user_error("training.max_length", config.training.max_length, hint)
