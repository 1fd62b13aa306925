"""flora-train solve: lets the base and the adapters of a run solve programming problems."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from flora_train.config.base import ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.language_names import ProgrammingLanguages
from flora_train.config.run_overrides import with_overrides
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import print_plain
from flora_train.evaluation.code.completion_files import Completion, check_multipl_e, write_multipl_e
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.contenders import check_peft_contenders
from flora_train.evaluation.code.evaluate import Plan, evaluate_code, plan_evaluation
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.code.score_types import CodeSuite
from flora_train.evaluation.code.summary import read_summaries, read_summary, write_summary
from flora_train.evaluation.report.files import read_report_if_any, write_report
from flora_train.evaluation.report.results import not_measured
from flora_train.evaluation.report.terminal import print_pass_at_k
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.saved_files import check_evaluation
from flora_train.models.loading import load_base_model
from flora_train.run_context import load_run, locked, note_differences
from flora_train.runtime.atomic import real_path
from flora_train.runtime.distributed import on_main_process, wait_for_everyone
from flora_train.runtime.manifest import suite_files
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.runtime.run_lock import RunLock
from flora_train.training.origin import OriginOptions


class SolveOptions(ConfigModel):
    languages: Annotated[ProgrammingLanguages, Field(min_length=1)] | None = None
    """The same as evaluation.languages."""
    contenders: Annotated[list[PathText], Field(min_length=1)] | None = None
    """Other PEFT adapters, folders or hub names, that solve the same problems."""
    out: PathText | None = None
    """Folder of completions, verdicts and scores. Default: eval/<suite> of the run, which its report
    shows."""
    multipl_e: PathText | None = None
    """Also write the completions here in MultiPL-E's layout: one folder per contender and language."""


@dataclass(frozen=True)
class SolveJob:
    """What a call of solve works on."""

    folder: RunFolder
    recorded: RunConfig
    """The configuration that the run was trained with."""
    config: RunConfig
    """With the overrides of this call."""
    plan: Plan
    results: Path
    """The folder that results are written into."""
    contenders: Sequence[str]
    layout: Path | None
    """Folder of the completions in MultiPL-E's layout."""
    report: Report | None
    """The run's report, which is written again with the new results."""


def solve_run(
    run: str, overrides: Sequence[str] = (), *, allow_different_base: bool = False, **values: object
) -> None:
    """Let the base and the adapters of a run solve programming problems, and print pass@k.

    Completions of an earlier call are kept. overrides: `evaluation.KEY=VALUE` and `tasks.TASK.KEY=VALUE`,
    instead of the run's own; values: SolveOptions. Raises UserError for wrong input before the model is
    loaded.
    """
    folder, recorded = open_run(run)
    options = read_options(SolveOptions, values)
    allow = OriginOptions(allow_different_base=allow_different_base)
    config = _config_of(recorded, overrides, options)
    if not folder.adapters.is_dir() or not any(folder.adapters.iterdir()):
        raise user_error("run", run, "has no adapters: it did not finish; resume it with resume=true")
    contenders = options.contenders or ()
    check_peft_contenders(contenders, ())
    results = folder.evaluation if options.out is None else Path(options.out)
    in_run = real_path(results).is_relative_to(real_path(folder.path))
    reservation = nullcontext() if in_run else _reserved(results)
    with locked(run, alone=in_run or allow.allow_different_base) as folder, reservation:
        report = None
        if options.out is None:
            report = on_main_process(lambda: read_report_if_any(folder))
        plan = on_main_process(lambda: plan_evaluation(config))
        layout = None if options.multipl_e is None else Path(options.multipl_e)
        job = SolveJob(folder, recorded, config, plan, results, contenders, layout, report)
        on_main_process(lambda: _check_files(job))
        context, _ = load_run(run, allow=allow)
        on_main_process(lambda: note_differences(folder, "solve", context.differences))
        evaluate_code(
            config,
            plan,
            context.model,
            bank=context.bank,
            tokenizer=context.tokenizer,
            folder=results,
            peft=contenders,
            load_base=lambda: load_base_model(config.model, context.bank.device),
        )
        on_main_process(lambda: _write_results(job, context.differences))
        wait_for_everyone()


def _config_of(recorded: RunConfig, overrides: Sequence[str], options: SolveOptions) -> RunConfig:
    """The run's configuration with the changes of this call. Raises UserError if it names no problems."""
    words = list(overrides)
    if options.languages is not None:
        words.append(f"evaluation.languages={json.dumps(options.languages)}")
    config = with_overrides(recorded, words)
    if not config.evaluation.problems:
        hint = (
            "is required: give evaluation.problems=starter, a folder of MultiPL-E's prompt files, or "
            "evaluation.problems=hub:nuprl/MultiPL-E"
        )
        raise user_error("evaluation.problems", None, hint)
    return config


@contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    """A folder outside the run, in which no other process solves or trains meanwhile. Raises UserError if one
    does."""
    parents = (real_path(folder), *real_path(folder).parents)
    run_folder = next((parent for parent in parents if (parent / "run.json").exists()), folder)
    lock = RunLock(run_folder)
    on_main_process(lock.take)
    try:
        yield
    finally:
        lock.release()


def _check_files(job: SolveJob) -> None:
    """Raises UserError for damaged results of an earlier call, and for completions in `layout` that are not
    in the logs."""
    suites = {suite.name: job.plan.languages for suite in job.plan.suites}
    check_evaluation(job.results, suites, job.config)
    if job.results == job.folder.evaluation:
        job.folder.add_files(suite_files(suites))
    if job.layout is not None:
        for suite in job.plan.suites:
            check_multipl_e(_completions(job.results, suite), job.layout, job.config.evaluation)


def _completions(results: Path, suite: Suite) -> list[Completion]:
    completions = []
    for entry in CompletionLog(results / suite.name).read().values():
        problem = suite.problems.get(entry.language, {}).get(entry.name)
        if problem is not None:
            completions.append(Completion(entry.adapter, problem, entry.sample, entry.completion))
    return completions


def _write_results(job: SolveJob, differences: Sequence[str]) -> None:
    """Print pass@k; write the completions in MultiPL-E's layout and the report, where these are asked for."""
    if differences:
        _note_in_scores(job, differences)
    summaries = read_summaries(job.results)
    print_pass_at_k(summaries)
    for suite in job.plan.suites:
        print_plain(f"\ncompletions, verdicts, scores   {job.results / suite.name}/")
        if job.layout is not None:
            folder = write_multipl_e(_completions(job.results, suite), job.layout, job.config.evaluation)
            print_plain(f"in MultiPL-E's layout           {folder}/")
    if job.report is not None:
        page = _write_report(job, job.report, summaries, differences)
        print_plain(f"report                          {page}")


def _note_in_scores(job: SolveJob, differences: Sequence[str]) -> None:
    for suite in job.plan.suites:
        folder = job.results / suite.name
        summary = read_summary(folder)
        if summary is not None:
            write_summary(summary.replace(origin_differences=differences), folder)


def _write_report(
    job: SolveJob, report: Report, summaries: Sequence[CodeSuite], differences: Sequence[str]
) -> Path:
    """Write the run's report with these results."""
    all_differences = list(dict.fromkeys([*report.facts.origin_differences, *differences]))
    extended = report.replace(
        facts=report.facts.replace(origin_differences=all_differences),
        code=summaries,
        not_measured=[
            *not_measured(job.recorded, executed=True, preferences=bool(report.preferences)),
            *all_differences,
        ],
    )
    return write_report(extended, job.folder.evaluation)
