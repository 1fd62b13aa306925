"""flora-train train: one run from its configuration to the report, stage by stage."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flora_train.commands.run_result import RunResult
from flora_train.commands.train_federated import show_federated, train_federated
from flora_train.config.json_format import JsonObject
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import plain, safe_streams
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.hub_commits import commits_of, resolve_commits
from flora_train.data.task import notes_on_rows
from flora_train.data.tokenization import tokenizer_hash
from flora_train.evaluation.answers.figures import check_metrics
from flora_train.evaluation.answers.prompts import answered_tasks, check_answered
from flora_train.evaluation.code.evaluate import Plan, plan_evaluation, prompts_of
from flora_train.evaluation.figures.own_labels import check_label_metrics
from flora_train.evaluation.figures.selection import selections_of
from flora_train.evaluation.generation import batching_note, check_prompts
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.terminal import show
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.saved_files import check_saved
from flora_train.evaluation.speech.cache_check import check_transcribing
from flora_train.export.loadability import log_notes
from flora_train.export.peft_import import init_from_peft
from flora_train.final_evaluation import reported_speedup, run_final_evaluation, training_facts
from flora_train.models.base_identity import base_identity
from flora_train.models.probe_inputs import count_tokens, noise_features
from flora_train.prerequisites import check_prerequisites, spans_machines
from flora_train.run_context import (
    RunContext,
    as_it_began,
    check_base,
    check_data,
    closed_after_error,
    load_context,
    make_accelerator,
    resolve_config,
)
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.config_changes import comparable
from flora_train.runtime.distributed import (
    check_alike,
    check_world_size,
    is_main_process,
    on_every_process,
    on_main_process,
    wait_for_everyone,
)
from flora_train.runtime.environment import dtype_of
from flora_train.runtime.hub_snapshot import pin_commits
from flora_train.runtime.manifest import suite_files
from flora_train.runtime.run_folder import RunFolder, RunStatus
from flora_train.runtime.signals import Interrupted
from flora_train.tracking import begin_tracking, end_tracking
from flora_train.training.add_tasks import read_finished_run
from flora_train.training.fsdp import uses_sharding
from flora_train.training.joint_speedup import time_joint_vs_separate
from flora_train.training.origin import OriginOptions, data_of
from flora_train.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def train_run(config: RunConfig) -> RunResult:
    """Train, evaluate, report and export one run.

    Args:
        config: The run, for instance from `load_config`.

    Returns:
        The finished run: its folder (an `os.PathLike`), report and metrics.

    Raises:
        UserError: Bad input; before any long work where it can be known.
        Interrupted: The run was stopped during training and is saved; `resume=true` continues it.
    """
    if not spans_machines():
        check_prerequisites(config)
    return train_checked(config)


@safe_streams()
def train_checked(config: RunConfig) -> RunResult:
    """`train_run`, after `check_prerequisites` unless there are several machines."""
    started = time.monotonic()
    folder = RunFolder(Path(config.folder))
    accelerator = make_accelerator(config, folder)
    on_every_process(lambda: check_world_size(config.num_processes, accelerator.num_processes))
    if spans_machines():
        on_every_process(lambda: check_prerequisites(config))
    pin_commits(on_main_process(lambda: resolve_commits(config, _recorded_commits(config, folder))))
    config = on_every_process(lambda: resolve_config(config, folder))
    check_alike(lambda: comparable(config, with_evaluation=True))
    status = on_main_process(lambda: folder.enter(config))
    try:
        if status == "finished":
            logger.info(
                f"{folder.path} holds this run, finished; it is kept (resume=false overwrite=true runs it "
                "again)"
            )
            if is_main_process():
                show_run(config, folder)
        elif config.federated is not None:
            train_federated(config, folder, accelerator, status=status)
        else:
            _train_run(config, folder, accelerator, status=status, started=started)
    finally:
        folder.unlock()
    return RunResult(folder.path)


def show_run(config: RunConfig, folder: RunFolder) -> None:
    """Print the results of a finished run."""
    if config.federated is None:
        show(folder)
    else:
        show_federated(folder)


def _recorded_commits(config: RunConfig, folder: RunFolder) -> Mapping[str, str]:
    """The commits of the hub that the run began with, where it is resumed."""
    if not config.resume or not folder.known_facts:
        return {}
    return folder.facts().hub_commits or {}


def _train_run(
    config: RunConfig, folder: RunFolder, accelerator: Accelerator, *, status: RunStatus, started: float
) -> None:
    """`train_run`, while no other process works in the folder. started: time.monotonic() at its start."""
    plan = on_main_process(lambda: plan_evaluation(config, need_sandbox=False))
    on_main_process(lambda: check_metrics(config))
    context = load_checked(config, folder, accelerator.device, status=status, plan=plan)
    with closed_after_error(context.speech_processor):
        _train_loaded(context, accelerator, status=status, plan=plan, started=started)


def _train_loaded(
    context: RunContext, accelerator: Accelerator, *, status: RunStatus, plan: Plan | None, started: float
) -> None:
    """Train, evaluate and report a loaded run."""
    config, folder = context.config, context.folder
    trainer = Trainer(context, accelerator)
    fresh: list[int] = []
    """Adapters that are in their initial state."""
    check_alike(trainer.identity)
    if status == "extended":
        finished_run = on_every_process(lambda: read_finished_run(context, trainer.identity))
        trainer.extend(finished_run, partial(init_from_peft, context.bank))
        fresh = [context.bank.ids[name] for name in context.bank.ids if name not in finished_run.best]
    elif status == "new":
        fresh = list(range(len(context.bank.specs)))
        init_from_peft(context.bank, fresh)
    claim_folder(context, plan)
    on_every_process(lambda: begin_tracking(accelerator, config, folder))
    adapters, tasks, dtype = len(context.bank.specs), len(context.tasks), dtype_of(context.model)
    logger.info(f"{adapters} adapters on {tasks} tasks, base in {dtype}, on {accelerator.device}")
    if status == "interrupted":
        fresh = trainer.resume()
        init_from_peft(context.bank, fresh)
    trainer.prepare_references(partial(init_from_peft, context.bank), fresh)
    load_seconds = time.monotonic() - started
    try:
        trainer.train()
    except Interrupted as pause:
        if is_main_process():
            folder.update_run_json(interrupted=pause.step)
        raise
    on_main_process(lambda: record_training(context, trainer, load_seconds))
    run_final_evaluation(context, trainer.best_adapters.best, plan)
    on_main_process(lambda: finish(trainer, accelerator))
    wait_for_everyone()  # a process that exits early closes its end of the connections
    accelerator.end_training()


def load_checked(
    config: RunConfig, folder: RunFolder, device: torch.device, *, status: RunStatus, plan: Plan | None
) -> RunContext:
    """Load model, data and adapters, and check all that training and evaluation rely on. Raises UserError."""
    if status != "new":
        on_main_process(lambda: check_saved(folder, config, plan))
        on_main_process(lambda: check_base(folder, config, OriginOptions()))
    for reason in dict.fromkeys(plan.broken.values() if plan else ()):
        logger.warning(f"some programs will not be evaluated: {reason}")
    loaded = config if status == "new" else as_it_began(config, folder)
    context = load_context(loaded, folder, device, sharded=uses_sharding(config))
    context = replace(context, config=config)  # compared with that of the run's beginning
    with closed_after_error(context.speech_processor):
        if status != "new":
            on_main_process(lambda: check_data(folder, context.tasks, OriginOptions()))
        on_every_process(context.check_model)
        on_every_process(lambda: check_texts(context, plan))
        selections = on_every_process(lambda: selections_of(config, context.tasks))
        on_main_process(lambda: log_notes(context.model, context.bank.pools))
    return replace(context, selections=selections)


def claim_folder(context: RunContext, plan: Plan | None) -> None:
    """Make the folder that of this run, and report what of the configuration and the data is not used."""
    config, folder, tasks = context.config, context.folder, context.tasks
    suites = suite_files(suite.name for suite in plan.suites) if plan else []
    facts = {"base_dtype": dtype_of(context.model), **origin_of(context)}
    on_main_process(lambda: folder.claim(config, suites, **facts))
    on_main_process(lambda: report_left_out(context))
    for note in (
        *notes_on_rows(tasks, config),
        *notes_on_unused(config.tasks, bool(config.evaluation.problems), selects=config.compares_states),
    ):
        logger.warning(note)


def origin_of(context: RunContext) -> JsonObject:
    """What identifies base, tokenizer and, by task, examples, for run.json."""
    return {
        "base": base_identity(context.config.model),
        "tokenizer": tokenizer_hash(context.tokenizer),
        "hub_commits": commits_of(context.config),
        "data": {name: data_of(task).model_dump(exclude_none=True) for name, task in context.tasks.items()},
    }


def record_training(context: RunContext, trainer: Trainer, load_seconds: float) -> None:
    """Write the costs of training into run.json, with those of separate runs where they are to be
    compared."""
    seconds = {
        "load": load_seconds,
        "train": trainer.state.seconds,
        "evaluate during training": trainer.state.evaluation_seconds,
    }
    started = time.monotonic()
    speedup = reported_speedup(time_joint_vs_separate(trainer))
    if speedup is not None:
        seconds["time separate runs"] = time.monotonic() - started
    facts = training_facts(context, seconds).replace(
        time_shares=trainer.timer.shares(), joined=trainer.joined, joint_speedup=speedup
    )
    context.folder.update_run_json(training=facts.model_dump(mode="json"))


def finish(trainer: Trainer, accelerator: Accelerator) -> None:
    """Mark the run as finished, delete its checkpoints, and show its results."""
    config, folder = trainer.config, trainer.folder
    ended = {"joined": trainer.joined, "identity": trainer.identity()}
    folder.update_run_json(finished=True, ended=ended, **folder.saved_metrics())
    trainer.checkpoints.clear()
    metrics = final_metrics(read_report(folder))
    end_tracking(accelerator, config, folder, metrics=metrics, step=trainer.state.step)
    show(folder)


def report_left_out(context: RunContext) -> None:
    """Report the clips that cannot be used, and list them in clips_left_out.tsv (task, split, reason,
    file)."""
    rows: list[tuple[str, str, str, str]] = []
    for name, task in context.tasks.items():
        for split, examples in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            unusable = {} if examples is None else examples.counts.unusable
            for reason, paths in unusable.items():
                rows += [(name, split, reason, path) for path in paths]
    if not rows:
        return
    file = context.folder.path / "clips_left_out.tsv"
    lines = [
        "\t".join(plain(cell, keep="") for cell in row)
        for row in [("task", "split", "reason", "file"), *rows]
    ]
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    counts = Counter(plain(reason, keep="") for _, _, reason, _ in rows)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    logger.warning(f"{len(rows)} clips are left out ({reasons}): {file}")


def check_texts(context: RunContext, plan: Plan | None) -> None:
    """Raises UserError if a prompt that is to be completed after training cannot be, or leaves no room for
    evaluation.max_new_tokens. Logs where texts are generated one row at a time. Collective where the base is
    sharded."""
    config, processor = context.config, context.speech_processor
    prompts = prompts_of(config, plan.suites if plan else (), context.tokenizer)
    check_label_metrics(config, context.tasks)
    answered = answered_tasks(config, context.tasks, context.model, context.tokenizer)
    if processor is not None:
        check_transcribing(context.model, noise_features(processor.store.extractor))
        return
    if not prompts and not answered:
        return
    check_answered(config, answered, context.model, context.tokenizer)
    if prompts:
        check_prompts(
            context.tokenizer,
            prompts,
            vocabulary=count_tokens(context.model),
            model=config.model,
            model_config=context.model.config,
            max_new_tokens=config.evaluation.max_new_tokens,
        )
    note = batching_note(context.model)
    if note is not None:
        logger.warning(note)
