"""What does a person at the terminal see when a run ends?"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from flora_train.config.terminal_text import in_cell, print_plain, print_table, shown
from flora_train.evaluation.report.results import read_report, reading_report
from flora_train.runtime.manifest import PEFT_WARNING
from flora_train.runtime.progress import duration
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.step_timer import format_shares


def print_results(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Held-out bits per byte of the base and every adapter, per task: value, difference to the base with its interval, and
    the best in bold. Fits 80 columns."""
    console = console or Console(soft_wrap=True)
    confidence = round(100 * results["results"][0]["confidence"])
    console.print(shown(f"\n{results['name']}: held-out bits per byte, lower is better", "bold"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "method", "bits per byte", f"difference to base [{confidence} % interval]"):
        table.add_column(heading, justify="left" if heading in ("task", "method") else "right", no_wrap=True)
    for result in results["results"]:
        table.add_row(in_cell(result["task"]), "base", _number(result["base"]["bits_per_byte"]["value"]), "")
        for contender in result["contenders"]:
            style = "bold" if contender["best"] else ""
            difference = contender["difference_to_base"]
            interval = f"[{_number(difference['low'], '+')}, {_number(difference['high'], '+')}]"
            cells = (
                contender["family"] + (" (best)" if contender["best"] else ""),
                _number(contender["bits_per_byte"]["value"]),
                f"{_number(difference['value'], '+')} {interval}",
            )
            table.add_row("", *(in_cell(text, style) for text in cells))
    print_table(table, console)


def print_sweeps(results: Mapping[str, Any], console: Console | None = None) -> None:
    """The winner of every sweep, per task."""
    console = console or Console(soft_wrap=True)
    for sweep in dict.fromkeys(part["sweep"] for part in results["sweeps"]):
        won = [f"{part['winner'] or 'none'} on {part['task']}" for part in results["sweeps"] if part["sweep"] == sweep]
        console.print(shown(f"\nsweep {sweep}: lowest bits per byte for {', '.join(won)}"))


def print_pass_at_k(suites: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """pass@k of the base and every contender, per suite and language, with intervals and the difference to the base."""
    console = console or Console(soft_wrap=True)
    for suite in suites:
        console.print(shown(f"\n{suite['suite']} problems: pass@k, higher is better", "bold"))
        for k in map(str, suite["k"]):
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            percent = f"{100 * suite['confidence']:.0f} %"
            for heading in ("language", "method", f"pass@{k} [{percent}]", "difference to base"):
                table.add_column(heading, justify="left" if heading in ("language", "method") else "right", no_wrap=True)
            macro = suite["macro"]
            several = [{**macro, "name": f"mean of {len(macro['languages'])}"}] if len(macro["languages"]) > 1 else []
            for part in [*suite["languages"], *several]:
                to_base = {d["a"]: d["pass_at"][k] for d in part["differences"] if d["b"] == "base"}
                title = part["name"]
                for contender in part["contenders"]:
                    difference = to_base.get(contender["family"])
                    row = (
                        title,
                        contender["family"],
                        _interval(contender["pass_at"][k]),
                        difference and _interval(difference, "+"),
                    )
                    table.add_row(*(in_cell(text or "") for text in row))
                    title = ""
            print_table(table, console)
        for left_out in suite["not_evaluated"]:
            console.print(shown(f"not evaluated: {left_out['language']}: {left_out['reason']}"))


def print_error_rates(speech: Mapping[str, Any] | None, console: Console | None = None) -> None:
    """Error rates of the base and every contender, per language, with the difference to the base. Fits 80 columns."""
    if speech is None:
        return
    console = console or Console(soft_wrap=True)
    console.print(shown("\nwords and characters that are wrong, lower is better", "bold"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    percent = f"{100 * speech['confidence']:.0f} %"
    for heading in ("task", "method", "WER", "normalised", f"difference to base [{percent}]", "CER"):
        table.add_column(heading, justify="left" if heading in ("task", "method") else "right", no_wrap=True)
    for part in speech["languages"]:
        to_base = {d["a"]: d["wer_normalized"] for d in part["differences"] if d["b"] == "base"}
        title = part["task"]
        for contender in part["contenders"]:
            difference = to_base.get(contender["family"])
            cells = [_number(contender[rate]["value"]) for rate in ("wer", "wer_normalized", "cer")]
            table.add_row(
                in_cell(title),
                in_cell(contender["family"]),
                *cells[:2],
                _interval(difference, "+") if difference else "",
                cells[2],
            )
            title = ""
    print_table(table, console)


def print_completions(results: Mapping[str, Any], console: Console | None = None) -> None:
    """One prompt per task, continued by the base and by the task's best adapter."""
    console = console or Console(soft_wrap=True)
    seen = set()
    for entry in results["completions"]:
        if entry["task"] in seen:
            continue
        seen.add(entry["task"])
        result = next((r for r in results["results"] if r["task"] == entry["task"]), None)
        if result is None:  # a task that no adapter learns
            continue
        best = [c["family"] for c in result["contenders"] if c["best"]]  # empty where no held-out loss is finite
        after = [(f"after, {family}", entry["completions"][family]) for family in best]
        for title, text in (("before", entry["completions"]["base"]), *after):
            console.print(shown(f"\n{entry['task']} ({title})", "bold"))
            console.print(shown(entry["prompt"], "dim"), shown(text.rstrip()), sep="")


def _interval(estimate: Mapping[str, Any], sign: str = "") -> str:
    return f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"


def _number(value: float | None, sign: str = "") -> str:
    return "not finite" if value is None else f"{value:{sign}.3f}"


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
    apart = len(list(folder.adapters.glob(f"*/{PEFT_WARNING}")))
    loads = f"PeftModel.from_pretrained loads them{f', all but the {apart} with a {PEFT_WARNING}' if apart else ''}"
    best = next((c["name"] for r in results["results"] for c in r["contenders"] if c["best"]), "ADAPTER")
    print_plain(
        f"\nreport    {folder.evaluation / 'report.html'}\nadapters  {folder.adapters}/<name>/ ({loads})\n"
        f"time      {', '.join(f'{stage} {duration(s)}' for stage, s in seconds.items())}\n"
        f"speed     {_speed(results)}\n"
        f"next      {_command()} export {folder.path} {best} --as merged"
    )


def _command() -> str:
    """How to call our command from this terminal, whether or not the environment is activated."""
    beside = Path(sys.executable).with_name("flora-train")
    if which("flora-train") or not beside.exists():
        return "flora-train"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)


def _speed(results: Mapping[str, Any]) -> str:
    tokens, seconds = sum(adapter["tokens"] for adapter in results["adapters"]), results["facts"]["seconds"].get("train")
    rate = f"{tokens / seconds:.0f} tokens/s" if seconds else "not recorded"
    shares = format_shares(results["facts"].get("time_shares", {}))
    return f"{rate}: {shares}" if shares else rate
