"""flora-train execute: judge completions that anybody made, in the sandbox, and say pass@k per adapter and language."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flora_train.config.errors import Problem, UserError, choices, did_you_mean
from flora_train.config.explain import explain
from flora_train.config.section import Section, Text
from flora_train.config.words import parse_words
from flora_train.evaluation.code.completions import read_completions
from flora_train.evaluation.code.execute import STATUSES, preflight
from flora_train.evaluation.code.languages import find_language, load_languages
from flora_train.evaluation.code.sandbox import Kind, open_sandbox
from flora_train.evaluation.code.scores import Score, check_k, score
from flora_train.evaluation.code.verdicts import judge_all
from flora_train.session import available_cpus


class ExecuteOptions(Section):
    prompts: Text | None = None
    """Folder of MultiPL-E's prompt files; needed where the completions do not carry their problems."""
    languages: Annotated[list[Text], Field(min_length=1)] | None = None
    """Judge these only. Default: all that the completions have."""
    k: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1]
    """pass@k for these k."""
    sandbox: Kind = "bubblewrap"
    """none runs programs unconfined; every verdict then says so."""
    workers: int | None = Field(None, ge=1)
    """Programs that run at one time. Default: the machine's cores."""
    out: Text | None = None
    """Where verdicts are appended. Default: beside the completions, as <name>.verdicts.jsonl."""


def execute_completions(file: str, words: Sequence[str]) -> None:
    """Raises UserError for bad input before anything runs; verdicts are written as they come, and a second call goes on."""
    options = _options(words)
    path = Path(file)
    completions = read_completions(path, None if options.prompts is None else Path(options.prompts))
    table = load_languages()
    used = {completion.problem.language for completion in completions}
    wanted = used if options.languages is None else set(options.languages)
    languages = {key: find_language(key, table) for key in sorted(wanted)}
    if absent := sorted(wanted - used):
        raise UserError(Problem("languages", absent[0], f"no completion is in it; there are {choices(sorted(used))}"))
    check_k((c.key for c in completions if c.problem.language in languages), options.k)
    sandbox = open_sandbox(options.sandbox)
    broken = preflight(languages.values(), sandbox)
    mine = [c for c in completions if c.problem.language in languages and c.problem.language not in broken]
    out = Path(options.out) if options.out else path.with_name(f"{path.name.removesuffix('.jsonl')}.verdicts.jsonl")
    records = judge_all(mine, languages, sandbox, out, options.workers or available_cpus())
    if records:
        _print(score(records, options.k))
        print(f"verdicts  {out}" + ("" if sandbox.kind == "bubblewrap" else "  (unconfined: sandbox=none)"))
    for reason in broken.values():
        print(f"not evaluated: {reason}")


def _options(words: Sequence[str]) -> ExecuteOptions:
    raw = parse_words(words)
    known = list(ExecuteOptions.model_fields)
    if unknown := [key for key in raw if key not in known]:
        raise UserError(
            *(Problem(key, None, f"unknown key; here are {choices(known)}.{did_you_mean(key, known)}") for key in unknown)
        )
    try:
        return ExecuteOptions.model_validate(raw)
    except ValidationError as error:
        raise UserError(*explain(error, raw)) from None


def _print(scores: Sequence[Score]) -> None:
    console = Console(soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("adapter", "language", "problems x n", *(f"pass@{k} [95 %]" for k in scores[0].pass_at)):
        table.add_column(heading, justify="left" if heading in ("adapter", "language") else "right", no_wrap=True)
    table.add_column("ended", overflow="fold")
    for row in scores:
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in row.pass_at.values()]
        ended = ", ".join(f"{row.ended[status]} {status}" for status in STATUSES if row.ended.get(status))
        table.add_row(row.adapter, row.language, f"{row.problems} x {row.n}", *cells, ended)
    console.print(table)
