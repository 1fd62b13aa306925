"""The tables and lines that a terminal shows when a run ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flora_train.config.terminal_text import in_cell, print_plain, print_table, shown
from flora_train.evaluation.code.score_types import CodeSuite, LanguageScores, MacroScores
from flora_train.evaluation.figures.result_types import FigureResult
from flora_train.evaluation.preferences.score_types import PreferenceResult
from flora_train.evaluation.report.expert_maps import load_line
from flora_train.evaluation.report.figure_tables import (
    against_baselines,
    ascii_figure,
    figure_tables,
    rows_of,
)
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.formatting import PLUS_MINUS, ascii_estimate, ascii_mean, ascii_number
from flora_train.evaluation.report.joined_seeds import adapters_of, note_on_seeds, with_joined_seeds
from flora_train.evaluation.report.published_rows import ComparedTable
from flora_train.evaluation.report.published_tables import caption, headings, lines_of
from flora_train.evaluation.report.types import ContenderResult, Report, TaskResult
from flora_train.evaluation.routing.load_types import ExpertLoad
from flora_train.evaluation.speech.score_types import SpeechResults
from flora_train.runtime.manifest import PEFT_WARNING
from flora_train.runtime.progress import duration
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.step_timer import format_shares

LEFT_ALIGNED = ("task", "language", "method")


def print_results(report: Report, console: Console | None = None) -> None:
    """Held-out bits per byte of the base and every adapter, per task, with the difference to the base and its
    interval.

    The best is bold. Fits 80 columns.
    """
    if not report.results:
        return
    console = console or Console(soft_wrap=True)
    console.print(shown(f"\n{report.name}: held-out bits per byte, lower is better", "bold"))
    level = _level(report.results[0].confidence)
    table = _table("task", "method", "bits per byte", f"difference to base [{level}]")
    for result in report.results:
        table.add_row(in_cell(result.task), "base", ascii_number(result.base.bits_per_byte.value), "")
        for contender in result.contenders:
            style = ""
            if contender.best and result.objective == "sft":
                style = "bold"
            cells = (
                contender.family + _remark(result, contender),
                ascii_mean(contender.bits_per_byte),
                ascii_estimate(contender.difference_to_base, "+"),
            )
            table.add_row("", *(in_cell(text, style) for text in cells))
    print_table(table, console)


def _remark(result: TaskResult, contender: ContenderResult) -> str:
    """` (best)` only among several methods, and marked where the lead is not clear."""
    if not contender.best or len(result.contenders) == 1 or result.objective != "sft":
        return ""
    return " (best)" if result.lead_is_clear else " (best, unclear)"


def print_sweeps(report: Report, console: Console | None = None) -> None:
    """The winner of every sweep, per task."""
    console = console or Console(soft_wrap=True)
    winners: dict[str, list[str]] = {}
    for result in report.sweeps:
        winners.setdefault(result.sweep, []).append(f"{result.winner or 'none'} on {result.task}")
    for sweep, names in winners.items():
        console.print(
            shown(f"\nsweep {sweep}: lowest {_compared_loss(report, sweep)} for {', '.join(names)}")
        )


def _compared_loss(report: Report, sweep: str) -> str:
    """What the settings of a sweep are compared by."""
    objectives = {result.objective for result in report.sweeps if result.sweep == sweep}
    if objectives == {"sft"}:
        return "bits per byte"
    return "held-out loss"


def print_pass_at_k(suites: Sequence[CodeSuite], console: Console | None = None) -> None:
    """pass@k of the base and every contender, per suite and language, with intervals."""
    console = console or Console(soft_wrap=True)
    for suite in suites:
        console.print(shown(f"\n{suite.suite} problems: pass@k, higher is better", "bold"))
        parts: list[tuple[str, LanguageScores | MacroScores]] = [
            (part.name, part) for part in suite.languages
        ]
        if len(suite.macro.languages) > 1:
            parts.append((f"mean of {len(suite.macro.languages)}", suite.macro))
        for k in suite.pass_at_k:
            table = _table(
                "language", "method", f"pass@{k} [{_level(suite.confidence)}]", "difference to base"
            )
            for title, part in parts:
                for contender in part.contenders:
                    change = ""
                    if contender.family in part.to_base:
                        change = ascii_estimate(part.to_base[contender.family][k], "+")
                    row = (title, contender.family, ascii_estimate(contender.pass_at[k]), change)
                    table.add_row(*map(in_cell, row))
                    title = ""
            print_table(table, console)
        for missing in suite.not_evaluated:
            console.print(shown(f"not evaluated: {missing.language}: {missing.reason}"))


def print_error_rates(speech: SpeechResults | None, console: Console | None = None) -> None:
    """Error rates of the base and every contender, per language. Fits 80 columns."""
    if speech is None:
        return
    console = console or Console(soft_wrap=True)
    console.print(shown("\nerror rates of words and characters, lower is better", "bold"))
    table = _table(
        "task", "method", "WER", "normalised", f"difference to base [{_level(speech.confidence)}]", "CER"
    )
    for part in speech.languages:
        title = part.task
        for contender in part.contenders:
            change = ""
            if contender.family in part.to_base:
                change = ascii_estimate(part.to_base[contender.family].wer_normalized, "+")
            table.add_row(
                in_cell(title),
                in_cell(contender.family),
                ascii_mean(contender.wer),
                ascii_mean(contender.wer_normalized),
                change,
                ascii_mean(contender.cer),
            )
            title = ""
    print_table(table, console)


def print_preferences(results: Sequence[PreferenceResult], console: Console | None = None) -> None:
    """Rewards of held-out preferences of the base and every adapter, per task. Fits 80 columns."""
    console = console or Console(soft_wrap=True)
    for kind, title in (
        ("pairs", "held-out pairs: share whose chosen completion has the higher reward"),
        ("rows", "held-out labelled rows: share whose reward has the sign of the label"),
    ):
        shown_results = [result for result in results if result.is_paired == (kind == "pairs")]
        if not shown_results:
            continue
        console.print(shown(f"\n{title}", "bold"))
        level = _level(shown_results[0].confidence)
        headings = ["task", "method", kind, f"accuracy [{level}]", "margin"]
        if kind == "pairs":
            headings.append("likelier")
        table = _table(*headings)
        for result in shown_results:
            names = [result.task, str(result.examples)]
            for contender in result.contenders:
                cells = [
                    names[0],
                    contender.family,
                    names[1],
                    ascii_estimate(contender.reward_accuracy),
                    ascii_mean(contender.reward_margin),
                ]
                if contender.chosen_likelier is not None:
                    cells.append(ascii_mean(contender.chosen_likelier))
                table.add_row(*map(in_cell, cells))
                names = ["", ""]
        print_table(table, console)
        if kind == "pairs":
            console.print(shown("likelier: share whose chosen completion has the higher log-probability"))


def print_figures(results: Sequence[FigureResult], console: Console | None = None) -> None:
    """Figures of answers, labels and losses of the base, every adapter and baselines. Fits 80 columns."""
    console = console or Console(soft_wrap=True)
    for figure in figure_tables(results):
        text, level = figure.text, _level(figure.results[0].confidence)
        unit = ", percent" if text.in_percent else ""
        console.print(shown(f"\n{figure.title.removesuffix('.')}{unit}", "bold"))
        headings = ["task", "method", f"{text.name} [{level}]"]
        if figure.has_differences:
            headings.append("difference to base")
        table = _table(*headings)
        for result in figure.results:
            title = result.task
            for row, difference in rows_of(result):
                cells = [title, row.family, ascii_figure(row.value, text), ""]
                if difference is not None:
                    cells[-1] = ascii_figure(difference, text, "+")
                table.add_row(*map(in_cell, cells[: len(headings)]))
                title = ""
        print_table(table, console)
    for sentence in against_baselines(results):
        console.print(shown(sentence))


def print_experts(loads: Sequence[ExpertLoad], console: Console | None = None) -> None:
    """The load of the experts of every routed adapter, one line each."""
    if not loads:
        return
    console = console or Console(soft_wrap=True)
    console.print(shown("\nload of experts on held-out texts", "bold"))
    for load in loads:
        console.print(shown(f"{load.adapter}: {load_line(load)}"))


def print_published(tables: Sequence[ComparedTable], console: Console | None = None) -> None:
    """Published tables beside the figures of a run, with what differs in their set-up. Fits 80 columns."""
    console = console or Console(soft_wrap=True)
    for compared in tables:
        console.print(shown(f"\n{caption(compared)}", "bold"))
        console.print(shown(f"published: {compared.source}"))
        if compared.differs:
            console.print(shown("Not a replication of the published results. In this run:"))
            console.print(*(shown(f"  - {difference}") for difference in compared.differs), sep="\n")
        else:
            console.print(shown(compared.setup))
        table = _table(*headings(compared))
        table.padding = (0, 1, 0, 0)
        for line in lines_of(compared):
            cells = (line.published, line.published_change, line.value, line.change)
            table.add_row(*map(in_cell, (line.language, line.method, *cells)))
        print_table(table, console)
        for note in compared.notes:
            console.print(shown(f"note: {note}"))


def print_completions(report: Report, console: Console | None = None) -> None:
    """One prompt per task, continued by the base and by the task's best adapter."""
    console = console or Console(soft_wrap=True)
    results = {result.task: result for result in report.results}
    printed = set()
    for sample in report.completions:
        if sample.task in printed or sample.task not in results:
            continue
        printed.add(sample.task)
        texts = [("before", sample.completions["base"])]
        best = results[sample.task].best
        if best is not None:
            families = [adapter.family for adapter in adapters_of(report, sample.task, best.family)]
            shown_families = [family for family in families if family in sample.completions]
            for family in shown_families[:1]:  # of several seeds the first
                texts.append((f"after, {family}", sample.completions[family]))
        for title, text in texts:
            console.print(shown(f"\n{sample.task} ({title})", "bold"))
            if sample.is_dialogue:
                console.print(shown(sample.prompt_text, "dim"))
                console.print(shown(f"assistant: {text.strip()}"))
                continue
            console.print(shown(sample.prompt_text, "dim"), shown(text.rstrip()), sep="")


def show(folder: RunFolder) -> None:
    """Print the results of a run and the paths of its files."""
    report = read_report(folder)
    joined = with_joined_seeds(report)
    print_results(joined)
    if note := note_on_seeds(report):
        print_plain(f"\n{note.replace(PLUS_MINUS, '+/-')}")
    print_sweeps(joined)
    print_pass_at_k(joined.code)
    print_error_rates(joined.speech)
    print_preferences(joined.preferences)
    print_figures(joined.figures)
    print_experts(joined.experts)
    print_completions(report)
    names = []
    for result in report.results:
        if result.best is not None:
            names += [adapter.name for adapter in adapters_of(report, result.task, result.best.family)]
    best = next(iter([*names, *(adapter.name for adapter in report.adapters)]), "ADAPTER")
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.facts.seconds.items())
    print_plain(
        f"\nreport    {folder.evaluation / 'report.html'}\n"
        f"adapters  {folder.adapters}/<name>/ ({_loaded_by_peft(folder)})\n"
        f"time      {stages}\n"
        f"speed     {_speed(report)}\n"
        f"next      {_command()} export {folder.path} {best} --as merged"
    )


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        justify: Literal["left", "right"] = "right"
        if heading in LEFT_ALIGNED:
            justify = "left"
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _level(confidence: float) -> str:
    return f"{100 * confidence:.3g} %"


def _loaded_by_peft(folder: RunFolder) -> str:
    unloadable = len(list(folder.adapters.glob(f"*/{PEFT_WARNING}")))
    text = "PeftModel.from_pretrained loads them"
    if unloadable:
        text += f", except the {unloadable} with a {PEFT_WARNING}"
    return text


def _command() -> str:
    """The command `flora-train` as this terminal finds it, whether or not the environment is activated."""
    installed = Path(sys.executable).with_name("flora-train")
    if which("flora-train") or not installed.exists():
        return "flora-train"
    if installed.is_relative_to(Path.cwd()):
        installed = installed.relative_to(Path.cwd())
    return str(installed)


def _speed(report: Report) -> str:
    tokens = sum(adapter.tokens for adapter in report.adapters)
    seconds = report.facts.seconds.get("train")
    text = "not recorded"
    if seconds:
        text = f"{tokens / seconds:.0f} tokens/s"
    if report.facts.time_shares:
        text += f": {format_shares(report.facts.time_shares)}"
    return text
