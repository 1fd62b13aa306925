"""RunContext: processes, tokenizer, tasks, base model and adapters of a run, loaded for a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.gate_members import resolve_members
from flora_train.adapters.init_from import resolve_init_from
from flora_train.adapters.layer_usage import describe_left_out
from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import LabelNames, expand
from flora_train.config.errors import choices, user_error
from flora_train.config.load import load_saved
from flora_train.config.schema import RunConfig
from flora_train.data.audio.collate import SpeechCollate
from flora_train.data.audio.decode import RATE
from flora_train.data.audio.features import FeatureStore
from flora_train.data.audio.speech_processor import GRAIN, SpeechProcessor, Windows, check_multilingual
from flora_train.data.batch import Collate, collate
from flora_train.data.split_by import expand_split_tasks
from flora_train.data.task import Task, label_names, load_tasks
from flora_train.data.tokenization import check_tokenizer, pad_token
from flora_train.kernels.backend import use_backend, use_precision
from flora_train.models.loading import (
    check_model_type,
    check_quantization,
    empty_model,
    is_english_only,
    load_base_model,
    load_feature_extractor,
    load_model_config,
    load_tokenizer,
)
from flora_train.models.probe_inputs import noise_features
from flora_train.models.speech_encoder import (
    count_positions,
    is_distilled,
    is_speech_model,
    is_whisper,
    max_text_tokens,
)
from flora_train.runtime.atomic import user_cache
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import on_every_process, on_main_process
from flora_train.runtime.environment import available_cpus, now
from flora_train.runtime.progress import ProgressBar
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.training.best_adapters import BestCheckpoint, load_best
from flora_train.training.context import TrainingContext
from flora_train.training.fsdp import apply_fsdp, check_launcher
from flora_train.training.origin import Origin, OriginOptions, allowed
from flora_train.training.row_check import check_rows
from flora_train.training.token_check import check_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunContext(TrainingContext):
    """Everything that the stages of a run need, loaded."""

    tokenizer: Any
    speech_processor: SpeechProcessor | None = None
    """For speech tasks."""
    differences: tuple[str, ...] = ()
    """Differences of base and data to those of training, which were allowed: sentences for the results."""

    def check_model(self) -> None:
        """Raises UserError if the model mixes the rows of a batch. Logs which layers take no adapter.
        Collective where the base is sharded.
        """
        features = (
            None if self.speech_processor is None else noise_features(self.speech_processor.store.extractor)
        )
        check_rows(self.model, self.pad_token, features)
        if self.bank.left_out:
            usable = {name for pool in self.bank.pools for name in pool.targets}
            logger.warning(f"no adapter is attached to {describe_left_out(self.bank.left_out, usable)}")

    def close(self) -> None:
        """Stop background workers."""
        if self.speech_processor is not None:
            self.speech_processor.store.close()


def resolve_config(config: RunConfig, folder: RunFolder | None = None) -> RunConfig:
    """The configuration with the tasks that split_by makes, and with the values that are read from init_from
    and over.

    folder: of the run, which keeps the values with which it began when it is resumed. Raises UserError if
    data or adapters are missing or do not fit.
    """
    config = expand_split_tasks(config)
    begun = None
    if folder is not None and config.resume and folder.config.is_file():
        begun = load_saved(folder.config)
    is_finished = folder is not None and begun is not None and folder.finished
    return resolve_members(resolve_init_from(config, begun), begun, is_finished=is_finished)


def load_context(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    *,
    with_tasks: bool = True,
    sharded: bool = False,
) -> RunContext:
    """Load a run. sharded: shard the base over the processes. Raises UserError, on all processes, if one
    cannot load.
    """
    context = on_every_process(
        lambda: _load(config, folder, device, with_tasks=with_tasks, sharded=sharded),
    )
    if sharded:
        apply_fsdp(context.bank)
    return context


def _load(
    config: RunConfig, folder: RunFolder, device: torch.device, *, with_tasks: bool, sharded: bool
) -> RunContext:
    """Data first, then the model, so that errors in a task are reported before the long load."""
    prepare(config, device)
    check_quantization(config.model, device)
    tokenizer, tasks, speech_processor = load_data(config, with_tasks)
    with closed_after_error(speech_processor):
        model = load_base_model(config.model, torch.device("cpu") if sharded else device)
        base_hash = fingerprint(model) if sharded else None
        features = None if speech_processor is None else noise_features(speech_processor.store.extractor)
        labels: LabelNames = label_names(tasks)
        if not with_tasks:
            labels = recorded_labels(folder)
        bank = AdapterBank.attach(
            model,
            expand(config, labels),
            seed=config.seed,
            paging=paging_of(config),
            device=device,
            features=features,
        )
    return RunContext(
        config=config,
        folder=folder,
        tasks=tasks,
        model=model,
        bank=bank,
        pad_token=pad_token(tokenizer),
        collate=_collate_for(config, speech_processor),
        base_hash=base_hash,
        tokenizer=tokenizer,
        speech_processor=speech_processor,
    )


def _collate_for(config: RunConfig, speech_processor: SpeechProcessor | None) -> Collate:
    if speech_processor is None:
        return collate
    return SpeechCollate(speech_processor.store, config.audio.spec_augment)


def prepare(config: RunConfig, device: torch.device) -> None:
    """Set threads, kernel backend and precision. Raises UserError for a backend that cannot run on this
    device.
    """
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or max(1, _cpus_per_process()))
    use_backend(config.kernels.backend, device)
    use_precision(config.kernels.precision)


def _cpus_per_process() -> int:
    return available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def load_data(
    config: RunConfig, with_tasks: bool = True
) -> tuple[Any, dict[str, Task], SpeechProcessor | None]:
    """Tokenizer, tasks (none without `with_tasks`), and the speech processor of a speech model."""
    tokenizer = load_tokenizer(config.model)
    if not all(task.has_head or task.embeds for task in config.tasks.values()):
        check_tokenizer(tokenizer, config.model.path)
    model_config = load_model_config(config.model)
    check_model_type(model_config, config)
    speech_processor = None
    if is_speech_model(model_config):
        speech_processor = build_speech_processor(config, model_config, tokenizer)
    tasks = {}
    with closed_after_error(speech_processor):
        if with_tasks:
            tasks = load_tasks(config, tokenizer, cache_folder(), speech_processor)
        if speech_processor is not None:
            check_transcripts(config, speech_processor)
        if tasks:
            check_tokens(config, tokenizer, tasks)
    unused = sorted(config.tasks.keys() - tasks.keys())
    if with_tasks and unused:
        logger.warning(f"no adapter learns {', '.join(unused)}: not read")
    return tokenizer, tasks, speech_processor


@contextmanager
def closed_after_error(speech_processor: SpeechProcessor | None) -> Iterator[None]:
    """A context that ends the background workers of a speech processor if an error leaves it."""
    try:
        yield
    except BaseException:
        if speech_processor is not None:
            speech_processor.store.close()
        raise


def check_transcripts(config: RunConfig, speech_processor: SpeechProcessor) -> None:
    """Raises UserError if a transcript of evaluation.max_new_tokens is longer than the decoder can read."""
    for name, task in config.tasks.items():
        if task.speech is None:
            continue
        prompt = speech_processor.prompt(task.speech, f"tasks.{name}")
        room = speech_processor.max_tokens - len(prompt) + 1  # the last token is generated, not read
        if config.evaluation.max_new_tokens > room:
            hint = (
                f"is more than the decoder has positions for ({speech_processor.max_tokens}, its prompt "
                "among them): "
                f"give at most {room}"
            )
            raise user_error("evaluation.max_new_tokens", config.evaluation.max_new_tokens, hint)


def recorded_labels(folder: RunFolder) -> dict[str, list[str]]:
    """Task -> its labels, as they were when the run began."""
    data = folder.facts().data or {}
    return {name: task.labels for name, task in data.items() if task is not None and task.labels}


def paging_of(config: RunConfig) -> Paging:
    """Where the run's adapters may be: on the device, in host memory, in files."""
    slots = config.paging.device_slots
    folder = None
    if config.paging.host == "disk":
        folder = Path(config.paging.folder or Path(config.folder).parent)
    return Paging(None if slots == "auto" else slots, folder)


def build_speech_processor(config: RunConfig, model_config: Any, tokenizer: Any) -> SpeechProcessor:
    """The speech processor of a speech model. Raises UserError if a package is missing, or for an
    English-only Whisper.
    """
    if is_whisper(model_config):
        check_multilingual(tokenizer, config.model.path, is_english_only(config.model, model_config))
        warn_if_distilled(config, model_config)
    for package in ("soundfile", "soxr", "jiwer"):
        if find_spec(package) is None:
            hint = f"speech tasks need the package {package}: pip install 'flora-train[speech]'"
            raise user_error("tasks", "speech", hint)
    workers = config.audio.workers
    if workers is None:
        workers = min(8, max(1, _cpus_per_process()))
    extractor = load_feature_extractor(config.model)
    gigabytes = config.audio.cache_gigabytes
    store = FeatureStore(cache_folder().parent / "features", extractor, gigabytes=gigabytes, workers=workers)
    windows, whisper = _windows(config, model_config, extractor), is_whisper(model_config)
    start = getattr(model_config, "decoder_start_token_id", None)
    return SpeechProcessor(
        tokenizer=tokenizer,
        windows=windows,
        max_tokens=max_text_tokens(model_config),
        whisper=whisper,
        start=start,
        store=store,
        audio=config.audio,
        progress=ProgressBar,
    )


def warn_if_distilled(config: RunConfig, model_config: Any) -> None:
    """Log a warning for other languages than English on a layout that distil-whisper trained on English."""
    languages = {task.speech.language for task in config.tasks.values() if task.speech is not None}
    others = sorted(languages - {"en"})
    if others and is_distilled(model_config):
        layout = f"{config.model.path} has {model_config.decoder_layers} decoder layers"
        logger.warning(
            f"{layout}, as the models that distil-whisper trained on English alone: unless it was distilled "
            f"on {choices(others)}, expect many more errors than with openai/whisper-large-v3-turbo"
        )


def _windows(config: RunConfig, model_config: Any, extractor: Any) -> Windows:
    """Whisper always encodes 30 s; other encoders take a clip as it is, up to the longest one."""
    if is_whisper(model_config):
        longest = model_config.max_source_positions * GRAIN
        return Windows(longest, config.audio.window_step, lambda samples: samples // GRAIN)
    longest = int(config.audio.max_seconds * RATE)
    positions = count_positions(empty_model(config.model), extractor)
    return Windows(longest, config.audio.window_step or 1.0, positions)


def load_run(
    run: str,
    with_tasks: bool = False,
    dtype: str | None = None,
    *,
    allow: OriginOptions | None = None,
    overridden: RunConfig | None = None,
    changed_tasks: Collection[str] = (),
) -> tuple[RunContext, dict[int, BestCheckpoint]]:
    """A run on disk with its best adapters in the bank, and their steps and losses.

    dtype: of the base, instead of the run's, without quantization; allow: which differences to the run's
    training are no error; overridden: a configuration instead of the run's, in which the examples of
    changed_tasks may differ.

    Raises UserError if a checkpoint is missing or damaged, or if base or data differ.
    """
    folder, recorded = open_run(run)
    config = overridden or recorded
    allow = allow or OriginOptions()
    if dtype is None:
        config = as_it_began(config, folder)
    else:
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"dtype": dtype, "quantization": "none"})}
        )
    device = make_accelerator(config, folder, trackers=False).device
    differences = on_main_process(lambda: check_base(folder, config, allow))
    context = load_context(config, folder, device, with_tasks=with_tasks)
    with closed_after_error(context.speech_processor):
        if not differences:  # a base from the hub is downloaded only now
            differences = on_main_process(lambda: check_base(folder, config, allow))
        differences += on_main_process(lambda: check_same_tokenizer(folder, context, allow))
        differences += on_main_process(lambda: check_data(folder, context.tasks, allow, changed_tasks))
        adapters = range(len(context.bank.specs))
        best = on_every_process(lambda: load_best(context.bank, adapters, folder.best_adapters))
    return replace(context, differences=tuple(differences)), best


def as_it_began(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration with the dtype at the run's begin: `auto` may mean another one on this machine."""
    dtype = folder.facts().base_dtype
    if config.model.dtype != "auto" or dtype not in ("float32", "bfloat16"):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def check_base(folder: RunFolder, config: RunConfig, allow: OriginOptions) -> list[str]:
    """Differences in the base, where they are allowed. Raises UserError where they are not."""
    problems = Origin.read(folder.facts()).base_differences(config)
    return allowed(problems, allow.allow_different_base, "--allow-different-base")


def check_same_tokenizer(folder: RunFolder, context: RunContext, allow: OriginOptions) -> list[str]:
    """Differences in the tokenizer, where they are allowed. Raises UserError where they are not."""
    problems = Origin.read(folder.facts()).tokenizer_differences(context.config, context.tokenizer)
    return allowed(problems, allow.allow_different_base, "--allow-different-base")


def check_data(
    folder: RunFolder, tasks: Mapping[str, Task], allow: OriginOptions, changed_tasks: Collection[str] = ()
) -> list[str]:
    """Differences in the examples, where they are allowed. changed_tasks: tasks whose examples were changed
    on purpose. Raises UserError where a difference is not allowed.
    """
    problems = Origin.read(folder.facts()).data_differences(tasks)
    on_purpose = [problem for problem in problems if problem.key.removeprefix("tasks.") in changed_tasks]
    others = [problem for problem in problems if problem not in on_purpose]
    sentences = allowed(others, allow.allow_different_data, "--allow-different-data")
    return [*sentences, *allowed(on_purpose, True, "changed for this evaluation")]


def note_differences(folder: RunFolder, command: str, differences: Sequence[str]) -> None:
    """Record in run.json which differences a command was allowed to ignore."""
    if not differences:
        return
    entries = folder.facts().allowed or []
    entry = {"command": command, "when": now(), "differences": list(differences)}
    folder.update_run_json(allowed=[*entries, entry])


@contextmanager
def locked(run: str, alone: bool = True) -> Iterator[RunFolder]:
    """A context in which no other process trains in the run folder; with `alone`, none reads in it either.
    Raises UserError if one does.
    """
    folder, config = open_run(run)
    make_accelerator(config, folder, trackers=False)  # initialises the process group
    on_main_process(folder.lock if alone else folder.share)
    try:
        yield folder
    finally:
        folder.unlock()


def make_accelerator(config: RunConfig, folder: RunFolder, trackers: bool = True) -> Any:
    """Accelerate's device, processes and trackers. wandb stays offline unless tracking.online is set."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    check_launcher()
    if not config.tracking.online:
        os.environ.setdefault("WANDB_MODE", "offline")
    names = config.tracking.trackers if trackers else []
    # the other processes wait while the main process executes programs
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=1))
    directories = ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.tensorboard))
    accelerator = Accelerator(
        log_with=names or None,
        project_config=directories,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[timeout],
    )
    on_every_process(lambda: _check_installed(names))
    return accelerator


def cache_folder() -> Path:
    """The folder of tokenized tasks, which runs share."""
    return user_cache("tokens")


def _check_installed(trackers: Sequence[str]) -> None:
    for tracker in trackers:
        if find_spec(tracker) is None:
            hint = f"is not installed: pip install 'flora-train[{tracker}]'"
            raise user_error("tracking.trackers", tracker, hint)
