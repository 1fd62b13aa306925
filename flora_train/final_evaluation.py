"""What is each adapter worth in the end? Held-out losses, programs, transcripts and texts; then adapters for others, the report and model cards."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flora_train.adapters.spec import BASE_ID
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.code.evaluate import Plan, evaluate_code
from flora_train.evaluation.code.summary import read_summaries
from flora_train.evaluation.generation import complete
from flora_train.evaluation.heldout_journal import HeldoutJournal
from flora_train.evaluation.report import write_report
from flora_train.evaluation.report.results import build_results
from flora_train.evaluation.speech.evaluate import evaluate_speech
from flora_train.evaluation.speech.summary import read_summary
from flora_train.export.model_card import write_card
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.usage_snippet import generation_example
from flora_train.run_context import RunContext
from flora_train.runtime.distributed import on_main_process, world
from flora_train.runtime.environment import dtype_of, environment, now, peak_memory
from flora_train.runtime.progress import ProgressBar
from flora_train.training.best_adapters import BestCheckpoint
from flora_train.training.fsdp import unshard
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.loss import RowLosses


def judge(session: RunContext, kept: Mapping[int, BestCheckpoint], plan: Plan | None = None, *, publish: bool = True) -> None:
    """Evaluate base and adapters on all held-out examples, let them write and solve problems, and leave report and exported
    adapters. publish: export the adapters, and write the results on their cards."""
    config, bank, folder = session.config, session.bank, session.folder
    started = time.monotonic()
    log = HeldoutJournal(folder.evaluation / "heldout", bank, {name: task.data_hash for name, task in session.tasks.items()})
    heldout = final_heldout(session, log)
    if publish:
        on_main_process(lambda: export_all(session))
    judged = time.monotonic()
    if plan is not None or any(task.sample_prompts for task in session.config.tasks.values()):
        unshard(session.model)
    if plan is not None:
        evaluate_code(config, plan, session.model, bank, session.tokenizer, folder.evaluation)
    if session.speech_processor is not None:
        evaluate_speech(
            config,
            session.tasks,
            session.model,
            bank=bank,
            speech_processor=session.speech_processor,
            folder=folder.evaluation,
        )
        session.close()
    seconds = {"evaluate at the end": judged - started}
    if plan is not None:
        seconds["solve problems"] = time.monotonic() - judged
    if session.speech_processor is not None:
        seconds["transcribe"] = time.monotonic() - judged
    on_main_process(lambda: write_results(session, kept, heldout, seconds, publish=publish))
    on_main_process(log.forget)


def export_all(session: RunContext) -> None:
    """A PEFT folder of each adapter."""
    base = BaseModel(session.config.model.path, session.config.model.revision)
    for name in session.bank.ids:
        export_peft(session.bank, name, session.folder.adapters / name, base=base)


def final_heldout(session: RunContext, log: HeldoutJournal) -> dict[str, HeldOut]:
    """Held-out losses of the base and all adapters on every held-out example."""
    room = 2 * session.config.training.tokens_per_microbatch
    with ProgressBar("evaluate", 1.0) as watch:
        return evaluate_heldout(
            RowLosses(session.model),
            session.bank,
            session.tasks.values(),
            room,
            pad_token(session.tokenizer),
            with_base=True,
            report=watch.update,
            collate=session.collate,
            log=log,
        )


def write_results(
    session: RunContext,
    kept: Mapping[int, BestCheckpoint],
    heldout: Mapping[str, HeldOut],
    seconds: Mapping[str, float],
    *,
    publish: bool = True,
) -> None:
    """Texts, report and model cards. seconds: stage of the evaluation -> what it took."""
    config, bank, folder = session.config, session.bank, session.folder
    started = time.monotonic()
    completions = write_completions(session)
    facts = folder.facts().get("training") or training_facts(session, {})
    facts["seconds"] = {**facts["seconds"], **seconds}
    facts["seconds"]["evaluate at the end"] += time.monotonic() - started
    facts["config"] = folder.config.read_text(encoding="utf-8")
    code, speech = read_summaries(folder.evaluation), read_summary(folder.evaluation)
    results = build_results(config, folder, session.tasks, bank, heldout, kept, completions, code, speech, facts)
    results["facts"]["differences"] = list(session.differences)
    results["not_measured"] += session.differences
    write_report(results, folder.evaluation)
    for spec in bank.specs if publish else ():
        example = generation_example(config, spec.task)
        write_card(results, spec, folder.adapters / spec.name, example=example)


def write_completions(session: RunContext) -> list[dict[str, Any]]:
    """Every task's sample prompts, continued by the base model and by the task's adapters in one batch."""
    requests, entries = [], []
    for name, task in session.config.tasks.items():
        for prompt in task.sample_prompts:
            adapters = [spec for spec in session.bank.specs if spec.task == name]
            if not adapters:
                continue
            entries.append({"task": name, "prompt": prompt, "families": ["base", *(spec.family for spec in adapters)]})
            requests += [(prompt, BASE_ID), *((prompt, session.bank.ids[spec.name]) for spec in adapters)]
    if not requests:
        return []
    texts = iter(
        complete(
            session.model,
            session.bank,
            session.tokenizer,
            requests,
            max_new_tokens=session.config.evaluation.max_new_tokens,
        )
    )
    return [
        {"task": entry["task"], "prompt": entry["prompt"], "completions": {family: next(texts) for family in entry["families"]}}
        for entry in entries
    ]


def training_facts(session: RunContext, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Where, with what and at what cost a run was trained; kept in run.json, so that a later evaluation cannot blur it."""
    facts = {**environment(), "seconds": dict(seconds), "peak_memory_bytes": peak_memory(session.bank.device)}
    facts |= {"processes": world()[1], "device": str(session.bank.device), "finished": now()}
    return facts | {"model": session.config.model.path, "dtype": dtype_of(session.model)}
