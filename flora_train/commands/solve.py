"""flora-train solve (and eval/run.py): let a trained run's base, adapters and any PEFT adapter solve programming problems."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

from pydantic import Field

from flora_train.config.base import ConfigModel, PathText, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.config.language_names import ProgrammingLanguages
from flora_train.config.run_overrides import with_overrides
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import print_plain
from flora_train.evaluation.code.completion_files import Completion, check_multipl_e, write_multipl_e
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.contenders import check_peft_contenders
from flora_train.evaluation.code.evaluate import Plan, evaluate_code, plan_evaluation
from flora_train.evaluation.code.problems.suites import Suite
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

Names = Annotated[list[Text], Field(min_length=1)]


class SolveOptions(ConfigModel):
    languages: Annotated[ProgrammingLanguages, Field(min_length=1)] | None = None
    """The same as evaluation.languages."""
    contenders: Annotated[list[PathText], Field(min_length=1)] | None = None
    """PEFT adapters, folders or hub names, that solve the same problems."""
    out: PathText | None = None
    """Folder of completions, verdicts and scores. Default: the run's own, eval/<suite>, which the report is drawn from."""
    multipl_e: PathText | None = None
    """Write the completions in MultiPL-E's layout, too: one folder a contender and language here."""


def solve_run(run: str, overrides: Sequence[str] = (), *, allow_different_base: bool = False, **values: object) -> None:
    """Let the base and the adapters of a run solve programming problems, and print pass@k.

    Completions of an earlier call are kept. overrides: `evaluation.KEY=VALUE` and `tasks.TASK.KEY=VALUE`, instead of the run's own; values:
    SolveOptions. Raises UserError for bad input before the model is loaded.
    """
    folder, recorded = open_run(run)
    options = read_options(SolveOptions, values)
    allow = OriginOptions(allow_different_base=allow_different_base)
    words = list(overrides)
    if options.languages is not None:
        words.append(f"evaluation.languages={json.dumps(options.languages)}")
    config = with_overrides(recorded, words)
    if not config.evaluation.problems:
        hint = "say which: evaluation.problems=starter, a folder of MultiPL-E's prompt files, or hub:nuprl/MultiPL-E"
        raise user_error("evaluation.problems", None, hint)
    if not folder.adapters.is_dir() or not any(folder.adapters.iterdir()):
        raise user_error("run", run, "has no adapters yet: it did not finish; train it on with resume=true")
    check_peft_contenders(options.contenders or (), ())
    place = folder.evaluation if options.out is None else Path(options.out)
    inside = real_path(place).is_relative_to(real_path(folder.path))
    apart = nullcontext() if inside else _reserved(place)
    with locked(run, alone=inside or allow.allow_different_base) as folder, apart:
        report = on_main_process(lambda: read_report_if_any(folder)) if options.out is None else None
        plan = on_main_process(lambda: plan_evaluation(config))
        suites = {suite.name: plan.languages for suite in plan.suites}
        on_main_process(lambda: check_evaluation(place, suites, config))
        if options.out is None:
            on_main_process(lambda: folder.add_files(suite_files(suite.name for suite in plan.suites)))
        if options.multipl_e is not None:
            on_main_process(lambda: _check_layout(plan, place, config.evaluation, Path(str(options.multipl_e))))
        _solve(run, config, options, allow, plan, place, folder, report, recorded)


@contextmanager
def _reserved(place: Path) -> Iterator[None]:
    """A folder outside the run, in which no other process solves or trains meanwhile. Raises UserError if one does."""
    outer = (folder for folder in (real_path(place), *real_path(place).parents) if (folder / "run.json").exists())
    lock = RunLock(next(outer, place))
    on_main_process(lock.take)
    try:
        yield
    finally:
        lock.release()


def _check_layout(plan: Plan, place: Path, evaluation: EvaluationConfig, layout: Path) -> None:
    """Raises UserError if `layout` holds completions that are not in the logs that it would be written from."""
    for suite in plan.suites:
        check_multipl_e(_completions(place, suite), layout, evaluation)


def _completions(place: Path, suite: Suite) -> list[Completion]:
    known = [entry for entry in CompletionLog(place / suite.name).read().values() if entry.language in suite.problems]
    problems = suite.problems
    return [
        Completion(entry.adapter, problems[entry.language][entry.name], entry.sample, entry.completion)
        for entry in known
        if entry.name in problems[entry.language]
    ]


def _solve(
    run: str,
    config: RunConfig,
    options: SolveOptions,
    allow: OriginOptions,
    plan: Plan,
    place: Path,
    folder: RunFolder,
    report: Report | None,
    recorded: RunConfig,
) -> None:
    session, _ = load_run(run, allow=allow)
    on_main_process(lambda: note_differences(folder, "solve", session.differences))
    evaluate_code(
        config,
        plan,
        session.model,
        session.bank,
        session.tokenizer,
        place,
        options.contenders or (),
        lambda: load_base_model(config.model, session.bank.device),
    )

    def finish() -> None:
        for suite in plan.suites if session.differences else ():
            summary = read_summary(place / suite.name)
            if summary is not None:
                write_summary(summary.replace(origin_differences=session.differences), place / suite.name)
        summaries = read_summaries(place)
        print_pass_at_k(summaries)
        for suite in plan.suites:
            print_plain(f"\ncompletions, verdicts, scores   {place / suite.name}/")
            if options.multipl_e is not None:
                layout = write_multipl_e(_completions(place, suite), Path(options.multipl_e), config.evaluation)
                print_plain(f"in MultiPL-E's layout           {layout}/")
        if report is not None:
            differences = list(dict.fromkeys([*report.facts.origin_differences, *session.differences]))
            extended = report.replace(
                facts=report.facts.replace(origin_differences=differences),
                code=summaries,
                not_measured=[*not_measured(recorded, executed=True), *differences],
            )
            page = write_report(extended, folder.evaluation)
            print_plain(f"report                          {page}")

    on_main_process(finish)
    wait_for_everyone()
