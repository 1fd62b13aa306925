"""flora-train execute: runs completions of any origin in the sandbox, and prints pass@k."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flora_train.config.base import MOST_PROCESSES, ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import choices, user_error
from flora_train.config.evaluation_schema import Ks, Sandbox
from flora_train.config.language_names import ProgrammingLanguages
from flora_train.config.terminal_text import in_cell, print_plain, print_table
from flora_train.evaluation.code.completion_files import Completion, read_completions
from flora_train.evaluation.code.problems.problem import prompt_file
from flora_train.evaluation.code.programs.execute import STATUSES, preflight
from flora_train.evaluation.code.programs.languages import Language, find_language, load_languages
from flora_train.evaluation.code.programs.sandbox import open_sandbox
from flora_train.evaluation.code.programs.verdicts import check_verdicts, collect_verdicts
from flora_train.evaluation.code.scores import Scores, check_k
from flora_train.runtime.environment import available_cpus


class ExecuteOptions(ConfigModel):
    prompts: PathText | None = None
    """Folder of MultiPL-E's prompt files; needed where the completions do not carry their problems."""
    languages: Annotated[ProgrammingLanguages, Field(min_length=1)] | None = None
    """Run these only. Default: all languages of the completions."""
    pass_at_k: Ks = [1]
    """pass@k for these k."""
    sandbox: Sandbox = "bubblewrap"
    """none runs programs unconfined, and every verdict records it."""
    cpu_seconds: float | None = Field(None, ge=0.01, le=86_400)
    """CPU time limit of one program, in seconds. Default: that of its language, in eval/languages.yaml."""
    workers: int | None = Field(None, ge=1, le=MOST_PROCESSES)
    """Programs that run at a time. Default: the machine's cores."""
    out: PathText | None = None
    """File that verdicts are appended to. Default: <name>.verdicts.jsonl beside the completions."""


def execute_completions(file: str, **values: object) -> None:
    """Run completions in the sandbox and print pass@k. values: ExecuteOptions.

    Verdicts are written one by one, and a second call continues the first. Raises UserError for wrong input
    before anything runs.
    """
    options = read_options(ExecuteOptions, values)
    path = Path(file)
    prompts = None if options.prompts is None else Path(options.prompts)
    completions = read_completions(path, prompts)
    languages = _languages(completions, options)
    chosen = [completion for completion in completions if completion.problem.language in languages]
    check_k((completion.key for completion in chosen), options.pass_at_k)
    out = path.with_name(f"{path.name.removesuffix('.jsonl')}.verdicts.jsonl")
    if options.out is not None:
        out = Path(options.out)
    _check_out(out, _inputs(path, prompts, languages))
    check_verdicts(chosen, languages, options.sandbox, file=out)
    sandbox = open_sandbox(options.sandbox)
    broken = preflight(languages.values(), sandbox)
    runnable = [completion for completion in chosen if completion.problem.language not in broken]
    workers = options.workers or available_cpus()
    records = collect_verdicts(runnable, languages, sandbox, file=out, workers=workers)
    if records:
        print_table(_score_table(Scores(records.values()), options.pass_at_k))
        where = f"verdicts  {out}"
        if sandbox.kind == "none":
            where += "  (unconfined: sandbox=none)"
        print_plain(where)
    for reason in broken.values():
        print_plain(f"not evaluated: {reason}")


def _languages(completions: Sequence[Completion], options: ExecuteOptions) -> dict[str, Language]:
    """The languages to run, by key. Raises UserError for one that no completion is in."""
    available = {completion.problem.language for completion in completions}
    chosen = available
    if options.languages is not None:
        chosen = set(options.languages)
    table = load_languages(options.cpu_seconds)
    languages = {key: find_language(key, table) for key in sorted(chosen)}
    absent = sorted(chosen - available)
    if absent:
        raise user_error(
            "languages", absent[0], f"no completion is in it; there are {choices(sorted(available))}"
        )
    return languages


def _inputs(completions: Path, prompts: Path | None, languages: Iterable[str]) -> list[Path]:
    """The files that are read."""
    files = [completions]
    if completions.is_dir():
        files += completions.glob("*")
    if prompts is None:
        return files
    for language in languages:
        file = prompt_file(prompts, language)
        if file is not None:
            files.append(file)
    return files


def _check_out(out: Path, inputs: Iterable[Path]) -> None:
    """Raises UserError where verdicts would be written over a file that is read."""
    try:
        same = [file for file in inputs if out.exists() and file.exists() and out.samefile(file)]
    except OSError as error:
        raise user_error(
            "out", str(out), f"cannot be written ({error.strerror}): give another file"
        ) from error
    if same:
        raise user_error("out", str(out), f"is {same[0]}, which is read: give another file")


def _score_table(scores: Scores, ks: Sequence[int]) -> Table:
    """pass@k of each adapter and language, with the number of programs by status."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("adapter", "language"):
        table.add_column(heading, no_wrap=True)
    for heading in ("problems x n", *(f"pass@{k} [95 %]" for k in ks)):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ended", overflow="fold", max_width=40)
    for cell in scores.cells:
        adapter, language = cell
        estimates = [scores.pass_at(cell, k) for k in ks]
        rates = [f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]" for estimate in estimates]
        counts = scores.ended[cell]
        ended = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
        if scores.early_exits[cell]:
            ended.append(f"{scores.early_exits[cell]} suspicious OK (exits early)")
        size = f"{len(scores.problems(cell))} x {scores.num_samples(cell)}"
        table.add_row(in_cell(adapter), in_cell(language), size, *rates, ", ".join(ended))
    return table
