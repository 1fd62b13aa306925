"""Writes the figures of committed results between their markers in README and docs.

Usage: python benchmarks/update_figures.py [--check]   (--check: change nothing, only compare)

Results come from `make quickstart`, `make sweep`, `make chat-local`, `make preferences-local` and recipe
multipl_e_local (benchmarks/results/<name>.json is that run's eval/report.json), from
`python benchmarks/joint.py --save` and from `python benchmarks/before_after.py --save`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

from joint import table
from rich.console import Console

from flora_train.evaluation.report.terminal import (
    print_completions,
    print_error_rates,
    print_pass_at_k,
    print_preferences,
    print_results,
)
from flora_train.evaluation.report.types import AdapterFacts, ContenderResult, Report
from flora_train.runtime.progress import duration

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"
STEP_TOKENS = 64 * 32
"""Rows and tokens per row of a step in the first regime of joint_cpu.json."""

PEERS = ROOT / "benchmarks" / "peers.md"
"""The rows of the comparison with other libraries that are not measured."""


def quickstart_block() -> str:
    """The output of `make quickstart`, and its machine."""
    results = read_report("quickstart")
    return f"{printed(results, print_completions)}\n\n{machine(results)}"


def quickstart_excerpt() -> str:
    """The first task's held-out losses and the mean pass@1, as `make quickstart` prints them."""
    lines = quickstart_block().splitlines()
    heldout = next(number for number, line in enumerate(lines) if line.endswith("lower is better"))
    solved = next(number for number, line in enumerate(lines) if line.endswith("higher is better"))
    mean = next(number for number, line in enumerate(lines) if line.startswith(" mean of "))
    title, _, heading, rule, first, *rest = lines[heldout:solved]
    first_task = [first, *takewhile(_continues, rest)]
    means = [lines[mean], *takewhile(_continues, lines[mean + 1 :])]
    pass_at_1 = [lines[solved], *lines[solved + 2 : solved + 4], " ...", *means]
    excerpt = [line.rstrip() for line in [title, heading, rule, *first_task, " ...", *pass_at_1]]
    return "\n".join(["~~~", *excerpt, "~~~"])


def _continues(row: str) -> bool:
    """Whether a printed row belongs to the row above: its first column is empty, but the row is not."""
    return row.startswith("  ") and bool(row.strip())


def crossover_block() -> str:
    """Speed against PEFT by the number of adapters that share a batch, and for one adapter alone."""
    results = read("joint_cpu")
    shared, alone = results["regimes"][0], results["regimes"][-1]
    counts = list(shared["adapters"])
    tokens = [f"{STEP_TOKENS // int(count):,}" for count in counts]
    rows = [
        f"| adapters in a step of {STEP_TOKENS:,} tokens | {' | '.join(counts)} |",
        "|---" * (len(counts) + 1) + "|",
        f"| tokens of each adapter | {' | '.join(tokens)} |",
    ]
    rivals = {"LoRA r=8": "PEFT loop, LoRA r=8", "fLoRA r=4": "PEFT loop, HiRA r=4"}
    for method, rival in rivals.items():
        ratios = [shared["adapters"][count]["ratios"][f"ours, {method}"][rival] for count in counts]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        label = f"{method}, times the speed of PEFT's {rival.split()[-2]}, one adapter after another"
        rows.append(f"| {label} | {cells} |")
    single = alone["adapters"]["1"]["ratios"]["ours, LoRA r=8"]["PEFT loop, LoRA r=8"]
    machine_name, threads = results["facts"]["machine"]["processor"], results["facts"]["threads"]
    note = (
        f"{machine_name}, {threads} threads, float32: a Llama of 4 layers, d = 256. "
        f"SmolLM2-135M with one adapter, 4 rows of 128 tokens, LoRA: {single:.2f} times."
    )
    return "\n".join([*rows, "", f"<sub>{note}</sub>"])


def comparison_block() -> str:
    """The comparison with other libraries, with the measured speed at 16 adapters."""
    ratios = read("joint_cpu")["regimes"][0]["adapters"]["16"]["ratios"]
    peft = ratios["ours, LoRA r=8"]["PEFT loop, LoRA r=8"]
    adapterhub = ratios["ours, LoRA r=8 without o and gate"][
        "AdapterHub BatchSplit, LoRA r=8 without o and gate"
    ]
    cells = [f"[{ratio:.2f}](docs/benchmarks.md)" for ratio in (peft, adapterhub)]
    measured = ["our LoRA, times its speed at 16 adapters", "", *cells, "not measured", "not measured"]
    return f"{PEERS.read_text(encoding='utf-8')}| {' | '.join(measured)} |"


def code_block() -> str:
    """Results of recipe multipl_e_local: held-out loss, and pass@k on every suite."""
    results = read_report("multipl_e_local")
    settings = [
        f"{suite.suite}: {suite.completions} completions at temperature {suite.temperature:g}, "
        f"at most {suite.max_new_tokens} tokens"
        for suite in results.code
    ]
    return (
        f"{printed(results)}\n\n{parsing(results)}\n\n<sub>{'; '.join(settings)}.</sub>\n{machine(results)}"
    )


def parsing(results: Report) -> str:
    """MultiPL-E: the share of programs that parse, and the share that reached the token limit."""
    suite = next(suite for suite in results.code if suite.suite == "multipl_e")
    families = [score.family for score in suite.languages[0].contenders]
    rows = [
        f"| MultiPL-E: programs that parse (that were cut off) | {' | '.join(families)} |",
        "|---" * (len(families) + 1) + "|",
    ]
    for part in suite.languages:
        counts = [
            (score.ended["SyntaxError"], score.cut, sum(score.ended.values())) for score in part.contenders
        ]
        shares = (f"{1 - refused / programs:.2f} ({cut / programs:.2f})" for refused, cut, programs in counts)
        rows.append(f"| {part.name} | {' | '.join(shares)} |")
    return "\n".join(rows)


def chat_block() -> str:
    """Results of recipe chat_local: held-out loss of the assistant's turns, and a dialogue of each task."""
    results = read_report("chat_local")
    return f"{printed(results, print_completions)}\n\n{machine(results)}"


def preferences_sft_block() -> str:
    """Results of recipe preferences_sft_local: held-out loss of functions."""
    results = read_report("preferences_sft_local")
    return f"{printed(results.replace(code=()))}\n\n{machine(results)}"


def preferences_block() -> str:
    """Results of recipe preferences_local: rewards of held-out pairs."""
    results = read_report("preferences_local")
    output = io.StringIO()
    print_preferences(results.preferences, Console(file=output, width=140, soft_wrap=True))
    return f"~~~\n{output.getvalue().strip()}\n~~~\n\n{machine(results)}"


def preferences_solved_block() -> str:
    """pass@1 after supervised learning and after DPO: the tables of benchmarks/results."""
    text = (RESULTS / "preferences_solved_cpu.md").read_text(encoding="utf-8")
    tables = text[text.index("## ") :].replace("## ", "#### ")
    heading = text.split("\n")[2]
    return f"{tables.strip()}\n\n<sub>{heading}</sub>"


def speech_block() -> str:
    """Results of recipe speech_local: error rates of base and adapters."""
    results = read_report("speech_local")
    return f"{error_rates(results)}\n\n{machine(results)}"


def speech_sweep_block() -> str:
    """Learning rates on one language: held-out loss and word error rate at the end."""
    results = read_report("speech_sweep")
    assert results.speech is not None
    (part,), (result,) = results.speech.languages, results.results
    heldout = {contender.family: contender.loss for contender in result.contenders}
    rates = {contender.family: contender.wer_normalized.value for contender in part.contenders}
    rows = [
        (
            f"| method | learning rate | held-out loss (base {result.base.loss:.3f}) | WER, normalised (base "
            f"{rates['base']:.3f}) |"
        ),
        "|---|---|---|---|",
    ]
    for adapter in results.adapters:
        name = " ".join(filter(None, (adapter.method, adapter.variant)))
        rows.append(
            f"| {name} | {adapter.lr:g} | {heldout[adapter.family]:.3f} | {rates[adapter.family]:.3f} |"
        )
    return "\n".join([*rows, "", machine(results)])


def error_rates(results: Report) -> str:
    """The error rates that a run prints, as a block."""
    output = io.StringIO()
    print_error_rates(results.speech, Console(file=output, width=140, soft_wrap=True))
    return f"~~~\n{output.getvalue().strip()}\n~~~"


def printed(results: Report, *more: Callable[[Report, Console], None]) -> str:
    """The last output of a run, as a block; completions in it may hold backticks."""
    output = io.StringIO()
    console = Console(file=output, width=140, soft_wrap=True)
    print_results(results, console)
    print_pass_at_k(results.code, console)
    for show in more:
        show(results, console)
    return f"~~~\n{output.getvalue().strip()}\n~~~"


def sweep_block() -> str:
    """Held-out bits per byte of every setting of the sweep."""
    results = read_report("quickstart_sweep")
    (result,) = results.results
    adapters = {adapter.family: adapter for adapter in results.adapters}
    rows = [
        f"| method | learning rate | held-out bits per byte (base {result.base.bits_per_byte.value:.3f}) |",
        "|---|---|---|",
    ]
    best: dict[tuple[str, str | None], float] = {}
    for contender in result.contenders:
        method, value = method_of(adapters[contender.family]), bits_per_byte(contender)
        best[method] = min(value, best.get(method, value))
    for contender in result.contenders:
        adapter, value = adapters[contender.family], bits_per_byte(contender)
        rank = f"r={adapter.rank}" if adapter.rank is not None else None
        name = " ".join(filter(None, (adapter.method, adapter.variant, rank)))
        text = f"{value:.3f}"
        if value == best[method_of(adapter)]:
            text = f"**{text}**"
        rows.append(f"| {name} | {adapter.lr:g} | {text} |")
    return "\n".join([*rows, "", machine(results)])


def joint_block() -> str:
    """The small model's tables of `python benchmarks/joint.py --save`."""
    results = read("joint_cpu")
    facts, regime = results["facts"], results["regimes"][0]
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in ("torch", "transformers", "peft"))
    where = (
        f"{facts['machine']['processor']}, {facts['threads']} threads, float32, {packages}; medians of "
        f"{regime['repeats']} steps"
    )
    rows = [
        row.replace("ours, ", "flora_train, ").replace("kept at", "share kept at")
        for row in table(regime)[2:]
    ]
    return "\n".join([*rows, f"<sub>{where} that took turns.</sub>"])


def method_of(adapter: AdapterFacts) -> tuple[str, str | None]:
    return adapter.method, adapter.variant


def bits_per_byte(contender: ContenderResult) -> float:
    """Raises ValueError if it is not finite: such a result is not published."""
    if contender.bits_per_byte.value is None:
        raise ValueError(f"{contender.name} has no finite loss")
    return contender.bits_per_byte.value


def machine(results: Report) -> str:
    """Where and with what the figures were measured."""
    facts, packages = results.facts, results.facts.packages
    seconds = ", ".join(f"{stage} {duration(time)}" for stage, time in facts.seconds.items())
    memory = (facts.peak_memory_bytes or 0) / 2**30
    return (
        f"<sub>{facts.machine.processor}, {facts.machine.cpus} CPUs, base in {facts.dtype}, torch "
        f"{packages['torch']}, "
        f"transformers {packages['transformers']}; {seconds}; {memory:.1f} GiB. One seed.</sub>"
    )


def read_report(name: str) -> Report:
    """A kept report of a run."""
    return Report.model_validate(read(name))


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def updated(text: str) -> str:
    """A text with updated figures between `<!-- figures: NAME -->` and `<!-- end -->`."""
    blocks = {"quickstart": quickstart_block, "sweep": sweep_block, "joint": joint_block, "code": code_block}
    blocks |= {"speech": speech_block, "speech_sweep": speech_sweep_block}
    blocks |= {
        "chat": chat_block,
        "preferences_sft": preferences_sft_block,
        "preferences": preferences_block,
        "preferences_solved": preferences_solved_block,
    }
    blocks |= {
        "quickstart_excerpt": quickstart_excerpt,
        "crossover": crossover_block,
        "comparison": comparison_block,
    }

    def replace(match: re.Match[str]) -> str:
        return f"<!-- figures: {match[1]} -->\n{blocks[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if a text is out of step"
    )
    options = parser.parse_args()
    stale = 0
    for path in TEXTS:
        now = path.read_text(encoding="utf-8")
        fresh = updated(now)
        stale += fresh != now
        if not options.check:
            path.write_text(fresh, encoding="utf-8")
    return int(options.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
