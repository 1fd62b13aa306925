"""flora-train execute: judge completions that anybody made, in the sandbox, and say pass@k per adapter and language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flora_train.config.base import MOST_PROCESSES, ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import Problem, UserError, choices, user_error
from flora_train.config.evaluation_schema import Ks, Sandbox
from flora_train.config.language_names import ProgrammingLanguages
from flora_train.config.terminal_text import in_cell, print_plain, print_table
from flora_train.evaluation.code.completion_files import Completion, read_completions
from flora_train.evaluation.code.problems.problem import prompt_file
from flora_train.evaluation.code.programs.execute import STATUSES, preflight
from flora_train.evaluation.code.programs.languages import find_language, load_languages
from flora_train.evaluation.code.programs.sandbox import open_sandbox
from flora_train.evaluation.code.programs.verdicts import check_verdicts, collect_verdicts
from flora_train.evaluation.code.scores import Scores, check_k
from flora_train.runtime.environment import available_cpus


class ExecuteOptions(ConfigModel):
    prompts: PathText | None = None
    """Folder of MultiPL-E's prompt files; needed where the completions do not carry their problems."""
    languages: Annotated[ProgrammingLanguages, Field(min_length=1)] | None = None
    """Judge these only. Default: all that the completions have."""
    pass_at_k: Ks = [1]
    """pass@k for these k."""
    sandbox: Sandbox = "bubblewrap"
    """none runs programs unconfined; every verdict then says so."""
    cpu_seconds: float | None = Field(None, ge=0.01, le=86_400)
    """What a program may compute, in seconds. Default: each language's, in eval/languages.yaml."""
    workers: int | None = Field(None, ge=1, le=MOST_PROCESSES)
    """Programs that run at one time. Default: the machine's cores."""
    out: PathText | None = None
    """Where verdicts are appended. Default: beside the completions, as <name>.verdicts.jsonl."""


def execute_completions(file: str, **values: object) -> None:
    """Run completions in the sandbox and print pass@k. values: ExecuteOptions.

    Verdicts are written as they come, and a second call goes on. Raises UserError for bad input before anything runs.
    """
    options = read_options(ExecuteOptions, values)
    path = Path(file)
    completions = read_completions(path, None if options.prompts is None else Path(options.prompts))
    table = load_languages(options.cpu_seconds)
    used = {completion.problem.language for completion in completions}
    wanted = used if options.languages is None else set(options.languages)
    languages = {key: find_language(key, table) for key in sorted(wanted)}
    if absent := sorted(wanted - used):
        raise UserError(Problem("languages", absent[0], f"no completion is in it; there are {choices(sorted(used))}"))
    check_k((c.key for c in completions if c.problem.language in languages), options.pass_at_k)
    out = Path(options.out) if options.out else path.with_name(f"{path.name.removesuffix('.jsonl')}.verdicts.jsonl")
    mine = [c for c in completions if c.problem.language in languages]
    _check_out(out, path, options, mine)
    check_verdicts(mine, languages, options.sandbox, file=out)
    sandbox = open_sandbox(options.sandbox)
    broken = preflight(languages.values(), sandbox)
    mine = [c for c in mine if c.problem.language not in broken]
    workers = options.workers or available_cpus()
    records = collect_verdicts(mine, languages, sandbox, file=out, workers=workers)
    if records:
        _print(Scores(records.values()), options.pass_at_k)
        print_plain(f"verdicts  {out}" + ("" if sandbox.kind == "bubblewrap" else "  (unconfined: sandbox=none)"))
    for reason in broken.values():
        print_plain(f"not evaluated: {reason}")


def _check_out(out: Path, completions: Path, options: ExecuteOptions, read: Sequence[Completion]) -> None:
    """Raises UserError where verdicts would be written over what is read."""
    inputs = [completions, *([] if completions.is_file() else completions.glob("*"))]
    if options.prompts is not None:
        words = {completion.problem.language for completion in read}
        inputs += [file for word in words if (file := prompt_file(Path(options.prompts), word)) is not None]
    try:
        same = out.exists() and next((file for file in inputs if file.exists() and out.samefile(file)), None)
    except OSError as error:
        raise user_error("out", str(out), f"cannot be written ({error.strerror}): give another file") from error
    if same:
        raise user_error("out", str(out), f"is {same}, which is read: give another file")


def _print(scores: Scores, ks: Sequence[int]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("adapter", "language", "problems x n", *(f"pass@{k} [95 %]" for k in ks)):
        table.add_column(heading, justify="left" if heading in ("adapter", "language") else "right", no_wrap=True)
    table.add_column("ended", overflow="fold", max_width=40)
    for adapter, language in scores.cells:
        cell = adapter, language
        found = [scores.pass_at(cell, k) for k in ks]
        cells = [f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in found]
        ended = [f"{scores.ended[cell][status]} {status}" for status in STATUSES if scores.ended[cell][status]]
        if scores.suspicious[cell]:
            ended.append(f"{scores.suspicious[cell]} suspicious OK (ends early)")
        table.add_row(
            in_cell(adapter), in_cell(language), f"{len(scores.problems(cell))} x {scores.n(cell)}", *cells, ", ".join(ended)
        )
    print_table(table)
