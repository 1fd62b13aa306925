"""What happens in a run, from the configuration to the report? The stages in order."""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import plain, safe_streams
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.task import notes_on_rows
from flora_train.data.tokenization import pad_token, tokenizer_hash
from flora_train.evaluation.code.evaluate import Plan, plan_evaluation, prompts_of
from flora_train.evaluation.generation import batching_note, check_prompts
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.terminal import show
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.saved_files import check_saved
from flora_train.evaluation.speech.cache_check import check_transcribing
from flora_train.export.loadability import log_notes
from flora_train.export.peft_import import init_from_peft
from flora_train.final_evaluation import joint_speedup, run_final_evaluation, training_facts
from flora_train.models.base_identity import base_identity
from flora_train.models.probe_inputs import count_tokens, noise_features
from flora_train.run_context import (
    RunContext,
    as_it_began,
    check_base,
    check_data,
    load_context,
    make_accelerator,
    resolve_config,
)
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.distributed import (
    check_alike,
    check_world_size,
    is_main_process,
    on_every_process,
    on_main_process,
    wait_for_everyone,
)
from flora_train.runtime.environment import dtype_of
from flora_train.runtime.manifest import suite_files
from flora_train.runtime.run_folder import RunFolder, RunStatus, comparable
from flora_train.runtime.signals import Interrupted
from flora_train.tracking import begin_tracking, end_tracking
from flora_train.training.add_tasks import grow
from flora_train.training.fsdp import uses_sharding
from flora_train.training.joint_speedup import time_joint_vs_separate
from flora_train.training.origin import OriginOptions, data_of
from flora_train.training.trainer import Trainer

logger = logging.getLogger(__name__)


@safe_streams()
def train_run(config: RunConfig) -> Path:
    """Train, evaluate, report and export one run; returns its folder. Raises UserError on bad input, before any long
    work where that can be known, and Interrupted if it is told to end while it trains."""
    started = time.monotonic()
    folder = RunFolder(Path(config.folder))
    accelerator = make_accelerator(config, folder)
    on_every_process(lambda: check_world_size(config.num_processes, accelerator.num_processes))
    config = on_every_process(lambda: resolve_config(config, folder))
    check_alike(lambda: comparable(config, with_evaluation=True))
    status = on_main_process(lambda: folder.enter(config))
    try:
        return _train_run(config, folder, accelerator, status, started)
    finally:
        folder.unlock()


def _train_run(config: RunConfig, folder: RunFolder, accelerator: Any, status: RunStatus, started: float) -> Path:
    """`train_run`, while no other process works in the folder."""
    if status == "finished":
        logger.info(f"{folder.path} holds this run, finished; it is kept (resume=false overwrite=true runs it again)")
        if is_main_process():
            show(folder)
        return folder.path
    plan = on_main_process(lambda: plan_evaluation(config, need_sandbox=False))
    if status != "new":
        on_main_process(lambda: check_saved(folder, config, plan))
        on_main_process(lambda: check_base(folder, config, OriginOptions()))
    for reason in dict.fromkeys(plan.broken.values() if plan else ()):
        logger.warning(f"some programs will not be evaluated: {reason}")
    loaded = config if status == "new" else as_it_began(config, folder)
    session = load_context(loaded, folder, accelerator.device, sharded=uses_sharding(config))
    if status != "new":
        on_main_process(lambda: check_data(folder, session.tasks, OriginOptions()))
    on_every_process(session.check_model)
    on_every_process(lambda: check_texts(session, plan))
    on_main_process(lambda: log_notes(session.model, session.bank.pools))
    pad = pad_token(session.tokenizer)
    data = (session.tasks, pad, folder, accelerator, session.collate)
    trainer = Trainer(config, session.model, session.bank, *data, session.base_hash)
    check_alike(trainer.identity)
    start = partial(init_from_peft, session.bank)
    if status == "extended":
        grow(trainer, start)
    elif status == "new":
        start(range(len(session.bank.specs)))
    suites = suite_files(suite.name for suite in plan.suites) if plan else []
    on_main_process(lambda: folder.claim(config, suites, base_dtype=dtype_of(session.model), **origin_of(session)))
    on_main_process(lambda: report_left_out(session))
    for note in [*notes_on_rows(session.tasks, config), *notes_on_unused(config.tasks, bool(config.evaluation.problems))]:
        logger.warning(note)
    on_every_process(lambda: begin_tracking(accelerator, config, folder))
    logger.info(
        f"{len(session.bank.specs)} adapters on {len(session.tasks)} tasks, base in {dtype_of(session.model)}, on {accelerator.device}"
    )
    if status == "interrupted":
        start(trainer.resume())
    seconds = {"load": time.monotonic() - started}
    try:
        trainer.train()
    except Interrupted as pause:
        if is_main_process():
            folder.update_run_json(interrupted=pause.step)
        session.close()
        raise
    seconds |= {"train": trainer.state.seconds, "evaluate during training": trainer.state.evaluation_seconds}
    on_main_process(lambda: note_training(session, trainer, seconds))
    run_final_evaluation(session, trainer.selection.kept, plan)

    def finish() -> None:
        ended = {"joined": trainer.joined, "identity": trainer.identity()}
        folder.update_run_json(finished=True, ended=ended, **folder.saved_metrics())
        trainer.checkpoints.clear()
        metrics = final_metrics(read_report(folder))
        end_tracking(accelerator, config, folder, metrics=metrics, step=trainer.state.step)
        show(folder)

    on_main_process(finish)
    wait_for_everyone()  # a process that leaves early takes its end of the connections with it
    accelerator.end_training()
    return folder.path


def origin_of(session: RunContext) -> dict[str, Any]:
    """What identifies base, tokenizer and, by task, examples, for run.json."""
    return {
        "base": base_identity(session.config.model),
        "tokenizer": tokenizer_hash(session.tokenizer),
        "data": {name: data_of(task) for name, task in session.tasks.items()},
    }


def note_training(session: RunContext, trainer: Trainer, seconds: dict[str, float]) -> None:
    """Write into run.json what training was; what its adapters would take apart is measured for that."""
    trained = time.monotonic()
    speedup = joint_speedup(time_joint_vs_separate(trainer))
    if speedup is not None:
        seconds["time separate runs"] = time.monotonic() - trained
    facts = training_facts(session, seconds).replace(
        time_shares=trainer.clock.shares(), joined=trainer.joined, joint_speedup=speedup
    )
    session.folder.update_run_json(training=facts.model_dump(mode="json"))


def report_left_out(session: RunContext) -> None:
    """Say which clips cannot be used, and list them all in clips_left_out.tsv (task, split, reason, file)."""
    lines = [
        "\t".join(plain(cell, keep="") for cell in (name, split, reason, path)) + "\n"
        for name, task in session.tasks.items()
        for split, held in (("train", task.train), ("validation", task.validation), ("test", task.test))
        for reason, paths in (held.counts.unusable.items() if held is not None else ())
        for path in paths
    ]
    if lines:
        file = session.folder.path / "clips_left_out.tsv"
        text = "task\tsplit\treason\tfile\n" + "".join(lines)
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
        reasons = Counter(line.split("\t")[2] for line in lines)
        logger.warning(f"{len(lines)} clips are left out ({', '.join(f'{n} {r}' for r, n in reasons.items())}): {file}")


def check_texts(session: RunContext, plan: Plan | None) -> None:
    """Raises UserError if a prompt that will be completed after training cannot be, or leaves no room for evaluation.max_new_tokens.
    Says so where texts are written one row at a time. Collective where the base is divided."""
    config, prompts = session.config, prompts_of(session.config, plan.suites if plan else ())
    if session.speech_processor is not None:
        check_transcribing(session.model, noise_features(session.speech_processor.store.extractor))
    if not prompts or session.speech_processor is not None:
        return
    check_prompts(
        session.tokenizer,
        prompts,
        vocabulary=count_tokens(session.model),
        model=config.model,
        model_config=session.model.config,
        max_new_tokens=config.evaluation.max_new_tokens,
    )
    if (note := batching_note(session.model)) is not None:
        logger.warning(note)
