"""What does every command on a run need loaded? Processes and device, tokenizer, tasks, base model and bank."""

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
from flora_train.adapters.init_from import resolve_init_from
from flora_train.adapters.layer_usage import describe_left_out
from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import expand
from flora_train.config.errors import user_error
from flora_train.config.load import load_saved
from flora_train.config.schema import RunConfig
from flora_train.data.audio.collate import SpeechCollate
from flora_train.data.audio.decode import RATE
from flora_train.data.audio.features import FeatureStore
from flora_train.data.audio.speech_processor import GRAIN, SpeechProcessor, Windows, check_multilingual
from flora_train.data.batch import Collate, collate
from flora_train.data.split_by import expand_split_tasks
from flora_train.data.task import Task, load_tasks
from flora_train.data.tokenization import check_tokenizer, pad_token
from flora_train.kernels.backend import use_backend, use_precision
from flora_train.models.loading import (
    check_model_type,
    check_quantization,
    empty_model,
    load_base_model,
    load_feature_extractor,
    load_model_config,
    load_tokenizer,
)
from flora_train.models.probe_inputs import noise_features
from flora_train.models.speech_encoder import count_positions, is_speech_model, is_whisper, max_text_tokens
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
        """Raises UserError where the model does not keep rows apart. Says which layers take no adapter. Collective where the base is
        divided."""
        features = (
            None if self.speech_processor is None else noise_features(self.speech_processor.store.extractor)
        )
        check_rows(self.model, self.pad_token, features)
        if self.bank.left_out:
            usable = {name for pool in self.bank.pools for name in pool.targets}
            logger.warning(f"no adapter is attached to {describe_left_out(self.bank.left_out, usable)}")

    def close(self) -> None:
        """End what works in the background."""
        if self.speech_processor is not None:
            self.speech_processor.store.close()


def resolve_config(config: RunConfig, folder: RunFolder | None = None) -> RunConfig:
    """The configuration with the tasks that split_by makes, and with the values that are read from init_from.

    folder: of the run, which keeps the values with which it began when it is resumed. Raises UserError if data or adapters are
    missing or do not fit.
    """
    config = expand_split_tasks(config)
    begun = None
    if folder is not None and config.resume and folder.config.is_file():
        begun = load_saved(folder.config)
    return resolve_init_from(config, begun)


def load_context(
    config: RunConfig, folder: RunFolder, device: torch.device, with_tasks: bool = True, sharded: bool = False
) -> RunContext:
    """sharded: divide the base among processes. Raises UserError, on all processes, where one of them cannot load."""
    session = on_every_process(lambda: _load(config, folder, device, with_tasks, sharded))
    if sharded:
        apply_fsdp(session.bank)
    return session


def _load(
    config: RunConfig, folder: RunFolder, device: torch.device, with_tasks: bool, sharded: bool
) -> RunContext:
    """Data first, then the model: what is wrong with a task is known before the long load."""
    prepare(config, device)
    check_quantization(config.model, device)
    tokenizer, tasks, speech_processor = load_data(config, with_tasks)
    model = load_base_model(config.model, torch.device("cpu") if sharded else device)
    base_hash = fingerprint(model) if sharded else None
    features = None if speech_processor is None else noise_features(speech_processor.store.extractor)
    bank = AdapterBank.attach(
        model, expand(config), seed=config.seed, paging=paging_of(config), device=device, features=features
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
    """Threads, and what computes adapters. Raises UserError for a backend that cannot run on this device."""
    if device.type == "cpu":
        torch.set_num_threads(
            config.num_threads or max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )
    use_backend(config.kernels.backend, device)
    use_precision(config.kernels.precision)


def load_data(
    config: RunConfig, with_tasks: bool = True
) -> tuple[Any, dict[str, Task], SpeechProcessor | None]:
    """Tokenizer, tasks (none without `with_tasks`), and what reads clips, where the model hears speech."""
    tokenizer = load_tokenizer(config.model)
    check_tokenizer(tokenizer, config.model.path)
    model_config = load_model_config(config.model)
    check_model_type(model_config, config)
    speech_processor = (
        build_speech_processor(config, model_config, tokenizer) if is_speech_model(model_config) else None
    )
    tasks = load_tasks(config, tokenizer, cache_folder(), speech_processor) if with_tasks else {}
    if speech_processor is not None:
        check_transcripts(config, speech_processor)
    if tasks:
        check_tokens(config, tokenizer, tasks)
    if with_tasks and (idle := sorted(config.tasks.keys() - tasks.keys())):
        logger.warning(f"no adapter learns {', '.join(idle)}: not read")
    return tokenizer, tasks, speech_processor


def check_transcripts(config: RunConfig, speech_processor: SpeechProcessor) -> None:
    """Raises UserError if a transcript of evaluation.max_new_tokens is longer than the decoder can read."""
    for name, task in config.tasks.items():
        if task.speech is None:
            continue
        room = (
            speech_processor.max_tokens - len(speech_processor.prompt(task.speech, f"tasks.{name}")) + 1
        )  # the last token is written, not read
        if config.evaluation.max_new_tokens > room:
            hint = (
                f"is more than the decoder has positions for ({speech_processor.max_tokens}, its prompt among them): "
                f"give at most {room}"
            )
            raise user_error("evaluation.max_new_tokens", config.evaluation.max_new_tokens, hint)


def paging_of(config: RunConfig) -> Paging:
    """Where this run's adapters may live."""
    slots = config.paging.device_slots
    folder = (
        None if config.paging.host == "memory" else Path(config.paging.folder or Path(config.folder).parent)
    )
    return Paging(None if slots == "auto" else slots, folder)


def build_speech_processor(config: RunConfig, model_config: Any, tokenizer: Any) -> SpeechProcessor:
    """What reads clips for a speech model. Raises UserError if a package is missing, or a Whisper knows English only."""
    if is_whisper(model_config):
        check_multilingual(tokenizer, config.model.path)
    for package in ("soundfile", "soxr", "jiwer"):
        if find_spec(package) is None:
            raise user_error(
                "tasks",
                "speech",
                f"speech tasks need the package {package}: pip install 'flora-train[speech]'",
            )
    share = available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = min(8, max(1, share)) if config.audio.workers is None else config.audio.workers
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


def _windows(config: RunConfig, model_config: Any, extractor: Any) -> Windows:
    """Whisper's reach to 30 s whatever is heard; other encoders hear what there is, up to the longest clip."""
    if is_whisper(model_config):
        return Windows(
            model_config.max_source_positions * GRAIN,
            config.audio.window_step,
            lambda samples: samples // GRAIN,
        )
    longest = int(config.audio.max_seconds * RATE)
    return Windows(
        longest, config.audio.window_step or 1.0, count_positions(empty_model(config.model), extractor)
    )


def load_run(
    run: str,
    with_tasks: bool = False,
    dtype: str | None = None,
    *,
    allow: OriginOptions | None = None,
    overridden: RunConfig | None = None,
    changed_tasks: Collection[str] = (),
) -> tuple[RunContext, dict[int, BestCheckpoint]]:
    """A run on disk with its kept adapters in the bank. dtype: of the base, instead of the run's, and not quantised; allow: which
    differences to what the run was trained with are no error; overridden: a configuration instead of the run's, in which the examples of
    changed_tasks may be others.

    Raises UserError if a checkpoint is missing or damaged, or if base or data are others.
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
    session = load_context(config, folder, device, with_tasks)
    if not differences:  # a base from the hub is on this machine only now
        differences = on_main_process(lambda: check_base(folder, config, allow))
    differences += on_main_process(lambda: check_same_tokenizer(folder, session, allow))
    differences += on_main_process(lambda: check_data(folder, session.tasks, allow, changed_tasks))
    adapters = range(len(session.bank.specs))
    kept = on_every_process(lambda: load_best(session.bank, adapters, folder.best_adapters))
    return replace(session, differences=tuple(differences)), kept


def as_it_began(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration of a run that has begun, with the type of its base: `auto` may mean another one on this machine."""
    began = folder.facts().get("base_dtype")
    if config.model.dtype != "auto" or began not in ("float32", "bfloat16"):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": began})})


def check_base(folder: RunFolder, config: RunConfig, allow: OriginOptions) -> list[str]:
    """What differs in the base, where that is allowed. Raises UserError where it is not."""
    found = Origin.read(folder.facts()).base_differences(config)
    return allowed(found, allow.allow_different_base, "--allow-different-base")


def check_same_tokenizer(folder: RunFolder, session: RunContext, allow: OriginOptions) -> list[str]:
    """What differs in the tokenizer, where that is allowed. Raises UserError where it is not."""
    found = Origin.read(folder.facts()).tokenizer_differences(session.config, session.tokenizer)
    return allowed(found, allow.allow_different_base, "--allow-different-base")


def check_data(
    folder: RunFolder, tasks: Mapping[str, Task], allow: OriginOptions, changed_tasks: Collection[str] = ()
) -> list[str]:
    """What differs in the examples, where that is allowed. changed_tasks: tasks whose examples were changed on purpose. Raises UserError
    where a difference is not allowed."""
    problems = Origin.read(folder.facts()).data_differences(tasks)
    on_purpose = [problem for problem in problems if problem.key.removeprefix("tasks.") in changed_tasks]
    others = [problem for problem in problems if problem not in on_purpose]
    sentences = allowed(others, allow.allow_different_data, "--allow-different-data")
    return [*sentences, *allowed(on_purpose, True, "changed for this evaluation")]


def note_differences(folder: RunFolder, command: str, differences: Sequence[str]) -> None:
    """Write into run.json what a command was allowed to do."""
    if differences:
        known = folder.facts().get("allowed")
        entry = {"command": command, "when": now(), "differences": list(differences)}
        folder.update_run_json(allowed=[*(known if isinstance(known, list) else []), entry])


@contextmanager
def locked(run: str, alone: bool = True) -> Iterator[RunFolder]:
    """A run folder in which no other process trains meanwhile; `alone`: nor reads. Raises UserError if one does."""
    folder, config = open_run(run)
    make_accelerator(config, folder, trackers=False)  # from here on the processes know each other
    on_main_process(folder.lock if alone else folder.share)
    try:
        yield folder
    finally:
        folder.unlock()


def make_accelerator(config: RunConfig, folder: RunFolder, trackers: bool = True) -> Any:
    """Accelerate's device, processes and trackers. wandb stays offline unless tracking.online says otherwise."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    check_launcher()
    if not config.tracking.online:
        os.environ.setdefault("WANDB_MODE", "offline")
    names = config.tracking.trackers if trackers else []
    timeout = InitProcessGroupKwargs(
        timeout=timedelta(days=1)
    )  # others wait while the main process executes programs
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
    """Where tokenised tasks are kept between runs."""
    return user_cache("tokens")


def _check_installed(trackers: Sequence[str]) -> None:
    for tracker in trackers:
        if find_spec(tracker) is None:
            raise user_error(
                "tracking.trackers", tracker, f"is not installed: pip install 'flora-train[{tracker}]'"
            )
