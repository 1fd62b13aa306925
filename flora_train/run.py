"""What happens in a run, from the configuration to the report? The stages in order."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any

from flora_train.adapters.base_files import base_identity
from flora_train.adapters.probe_inputs import count_tokens, noise_features
from flora_train.adapters.spec import expand
from flora_train.atomic import write_atomically
from flora_train.config.errors import fail
from flora_train.config.json_object import read_object
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import plain, print_plain, safe_streams
from flora_train.config.unused_keys import notes_on_unused
from flora_train.data.task import notes_on_rows
from flora_train.data.tokens import pad_token, tokenizer_hash
from flora_train.evaluation.code.evaluate import Plan, plan_evaluation, prompts_of
from flora_train.evaluation.generation import check_prompts, note_of
from flora_train.evaluation.report.terminal import (
    print_completions,
    print_error_rates,
    print_pass_at_k,
    print_results,
    print_sweeps,
)
from flora_train.evaluation.results import KINDS, SCHEMA, reading_report
from flora_train.evaluation.saved import check_evaluation, check_places
from flora_train.evaluation.speech.cache_check import check_transcribing
from flora_train.export.loadability import WARNING, say_what_peft_loads
from flora_train.export.peft_start import start_from_peft
from flora_train.judge import judge, training_facts
from flora_train.session import (
    Session,
    as_it_began,
    check_base,
    check_data,
    load_session,
    locked,
    make_accelerator,
    note_differences,
    reopen,
)
from flora_train.tracking import begin_tracking, end_tracking
from flora_train.training.apart import time_apart
from flora_train.training.clock import spoken
from flora_train.training.distributed import (
    check_alike,
    check_world_size,
    is_main_process,
    on_every_process,
    on_main_process,
    say,
    wait_for_everyone,
)
from flora_train.training.environment import dtype_of
from flora_train.training.growth import grow
from flora_train.training.manifest import suite_files
from flora_train.training.origin import OriginOptions, data_of
from flora_train.training.progress import duration
from flora_train.training.run_folder import RunFolder, Standing, comparable, open_run
from flora_train.training.sharding import loads_in_parts
from flora_train.training.signals import Interrupted
from flora_train.training.trainer import Trainer


@safe_streams()
def train_run(config: RunConfig) -> Path:
    """Train, evaluate, report and export one run; returns its folder. Raises UserError on bad input, before any long
    work where that can be known, and Interrupted if it is told to end while it trains."""
    started = time.monotonic()
    folder = RunFolder(Path(config.folder))
    accelerator = make_accelerator(config, folder)
    on_every_process(lambda: check_world_size(config.num_processes, accelerator.num_processes))
    check_alike(lambda: comparable(config, with_evaluation=True))
    standing = on_main_process(lambda: folder.enter(config))
    try:
        return _train_run(config, folder, accelerator, standing, started)
    finally:
        folder.unlock()


def _train_run(config: RunConfig, folder: RunFolder, accelerator: Any, standing: Standing, started: float) -> Path:
    """`train_run`, while no other process works in the folder."""
    if standing == "finished":
        say(f"{folder.path} holds this run, finished; it is kept (resume=false existing_run=replace runs it again)")
        if is_main_process():
            show(folder)
        return folder.path
    plan = on_main_process(lambda: plan_evaluation(config, need_sandbox=False))
    if standing != "free":
        on_main_process(lambda: check_saved(folder, config, plan))
        on_main_process(lambda: check_base(folder, config, OriginOptions()))
    for reason in dict.fromkeys(plan.broken.values() if plan else ()):
        say(f"note: some programs will not be evaluated: {reason}")
    loaded = config if standing == "free" else as_it_began(config, folder)
    session = load_session(loaded, folder, accelerator.device, in_parts=loads_in_parts(config))
    if standing != "free":
        on_main_process(lambda: check_data(folder, session.tasks, OriginOptions()))
    on_every_process(session.check_model)
    on_every_process(lambda: check_texts(session, plan))
    on_main_process(lambda: say_what_peft_loads(session.model, session.bank.pools))
    pad = pad_token(session.tokenizer)
    data = (session.tasks, pad, folder, accelerator, session.collate)
    trainer = Trainer(config, session.model, session.bank, *data, session.base_hash)
    check_alike(trainer.identity)
    start = partial(start_from_peft, session.bank)
    if standing == "grown":
        grow(trainer, start)
    elif standing == "free":
        start(range(len(session.bank.specs)))
    suites = suite_files(suite.name for suite in plan.suites) if plan else []
    on_main_process(lambda: folder.claim(config, suites, base_dtype=dtype_of(session.model), **origin_of(session)))
    on_main_process(lambda: report_left_out(session))
    for note in [*notes_on_rows(session.tasks, config), *notes_on_unused(config.tasks, bool(config.evaluation.problems))]:
        say(f"note: {note}")
    on_every_process(lambda: begin_tracking(accelerator, config, folder))
    say(
        f"{len(session.bank.specs)} adapters on {len(session.tasks)} tasks, base in {dtype_of(session.model)}, on {accelerator.device}"
    )
    if standing == "interrupted":
        start(trainer.resume())
    seconds = {"load": time.monotonic() - started}
    try:
        trainer.train()
    except Interrupted as pause:
        if is_main_process():
            folder.update_run_json(interrupted=pause.step)
        session.close()
        raise
    seconds |= {"train": trainer.at.seconds, "evaluate during training": trainer.at.evaluation_seconds}
    on_main_process(lambda: note_training(session, trainer, seconds))
    judge(session, trainer.selection.kept, plan)

    def finish() -> None:
        ended = {"joined": trainer.joined, "identity": trainer.identity()}
        folder.update_run_json(finished=True, ended=ended, **folder.saved_metrics())
        trainer.checkpoints.clear()
        end_tracking(accelerator, config, folder, read_report(folder), trainer.at.done)
        show(folder)

    on_main_process(finish)
    wait_for_everyone()  # a process that leaves early takes its end of the connections with it
    accelerator.end_training()
    return folder.path


def origin_of(session: Session) -> dict[str, Any]:
    """What identifies base, tokenizer and, by task, examples, for run.json."""
    return {
        "base": base_identity(session.config.model),
        "tokenizer": tokenizer_hash(session.tokenizer),
        "data": {name: data_of(task) for name, task in session.tasks.items()},
    }


def check_saved(folder: RunFolder, config: RunConfig, plan: Plan | None) -> None:
    """Raises UserError if something that the run's evaluation will read is damaged, or in the way of what it will write."""
    suites = {suite.name: plan.languages for suite in plan.suites} if plan else {}
    check_evaluation(folder.evaluation, suites, config)
    check_places(folders=[folder.adapters, *(folder.adapters / spec.name for spec in expand(config))])


def note_training(session: Session, trainer: Trainer, seconds: dict[str, float]) -> None:
    """Write into run.json what training was; what its adapters would take apart is measured for that."""
    trained = time.monotonic()
    more = {"time_shares": trainer.clock.shares(), "joined": trainer.joined, "apart": time_apart(trainer)}
    if more["apart"] is not None:
        seconds["time adapters apart"] = time.monotonic() - trained
    session.folder.update_run_json(training=training_facts(session, seconds) | more)


def report_left_out(session: Session) -> None:
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
        say(f"note: {len(lines)} clips are left out ({', '.join(f'{n} {r}' for r, n in reasons.items())}): {file}")


def check_texts(session: Session, plan: Plan | None) -> None:
    """Raises UserError if a prompt that will be completed after training cannot be, or leaves no room for evaluation.max_new_tokens.
    Says so where texts are written one row at a time. Collective where the base is divided."""
    config, prompts = session.config, prompts_of(session.config, plan.suites if plan else ())
    if session.ears is not None:
        check_transcribing(session.model, noise_features(session.ears.store.extractor))
    if not prompts or session.ears is not None:
        return
    rows, model_config = count_tokens(session.model), session.model.config
    check_prompts(session.tokenizer, prompts, rows, config.model, model_config, config.evaluation.max_new_tokens)
    if (note := note_of(session.model)) is not None:
        say(note)


def show(folder: RunFolder) -> None:
    """Print what a run found and where it is."""
    results = read_report(folder)
    with reading_report(folder.evaluation / "report.json"):
        _show(folder, results)


def _show(folder: RunFolder, results: Mapping[str, Any]) -> None:
    print_results(results)
    print_sweeps(results)
    print_pass_at_k(results["code"])
    print_error_rates(results["speech"])
    print_completions(results)
    seconds = results["facts"]["seconds"]
    apart = len(list(folder.adapters.glob(f"*/{WARNING}")))
    loads = f"PeftModel.from_pretrained loads them{f', all but the {apart} with a {WARNING}' if apart else ''}"
    best = next((c["name"] for r in results["results"] for c in r["contenders"] if c["best"]), "ADAPTER")
    print_plain(
        f"\nreport    {folder.evaluation / 'report.html'}\nadapters  {folder.adapters}/<name>/ ({loads})\n"
        f"time      {', '.join(f'{stage} {duration(s)}' for stage, s in seconds.items())}\n"
        f"speed     {_speed(results)}\n"
        f"next      {_command()} export {folder.path} {best} --as merged"
    )


def read_report(folder: RunFolder) -> dict[str, Any]:
    """report.json of a run. Raises UserError if there is none yet."""
    path = folder.evaluation / "report.json"
    if not path.exists():
        raise fail(
            "run",
            str(folder.path),
            "has no report yet: it did not finish; train it on with resume=true, or let flora-train evaluate judge what it kept",
        )
    renewed = f"flora-train evaluate {folder.path} renews it"
    results = read_object(path, renewed)
    if results.get("schema") != SCHEMA:
        fix = f"was written by another version (schema {results.get('schema')}, ours is {SCHEMA}): {renewed}"
        raise fail(str(path), None, fix)
    if wrong := [key for key, kind in KINDS.items() if not isinstance(results.get(key), kind)]:
        raise fail(str(path), None, f"is damaged ({wrong[0]} is missing or of another type): {renewed}")
    return results


def evaluate_run(run: str, **allow: bool) -> dict[str, Any]:
    """Judge a run's kept adapters again and rewrite its report, whose content is returned. allow: see OriginOptions.

    Raises UserError if the base or the data is not what the run was trained with, and that is not allowed.
    """
    options = OriginOptions(**allow)
    with locked(run) as folder:
        config = open_run(run)[1]
        plan = on_main_process(lambda: plan_evaluation(config, need_sandbox=False))
        on_main_process(lambda: check_saved(folder, config, plan))
        on_main_process(folder.check_metrics)
        session, kept = reopen(run, with_tasks=True, allow=options)
        on_main_process(lambda: note_differences(folder, "evaluate", session.differences))
        on_main_process(lambda: folder.add_files(suite_files(suite.name for suite in plan.suites) if plan else []))
        judge(session, kept, plan)
        return on_main_process(lambda: read_report(session.folder))


def _command() -> str:
    """How to call our command from this terminal, whether or not the environment is activated."""
    beside = Path(sys.executable).with_name("flora-train")
    if which("flora-train") or not beside.exists():
        return "flora-train"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def _speed(results: Mapping[str, Any]) -> str:
    tokens, seconds = sum(adapter["tokens"] for adapter in results["adapters"]), results["facts"]["seconds"].get("train")
    rate = f"{tokens / seconds:.0f} tokens/s" if seconds else "not recorded"
    shares = spoken(results["facts"].get("time_shares", {}))
    return f"{rate}: {shares}" if shares else rate
