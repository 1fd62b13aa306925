"""pass@1 of the adapters of one run against those of an earlier run, paired by problem.

Both runs have solved the same problems with the same settings (recipes preferences_sft_local and
preferences_local). Prints Markdown.

Usage: python benchmarks/before_after.py RUN_BEFORE RUN_AFTER [--names SFT DPO] [--save NAME]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flora_train.cli  # noqa: F401

# isort: split
from flora_train.evaluation.bootstrap import Estimate
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.scores import Scores
from flora_train.runtime.environment import environment

RESULTS = Path(__file__).parent / "results"
BASE = "base"
SAMPLED_ALIKE = ("temperature", "top_p", "max_new_tokens", "seed")


@dataclass(frozen=True)
class Solved:
    """What two runs have solved of one suite."""

    suite: str
    settings: dict[str, Any]
    scores: Scores
    adapters: list[tuple[str, str]]
    """(adapter, language) of both runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--names", nargs=2, default=("before", "after"), metavar=("BEFORE", "AFTER"))
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.md")
    options = parser.parse_args()
    folders = [options.before / "eval", options.after / "eval"]
    suites = sorted(file.parent.name for file in folders[1].glob("*/verdicts.jsonl"))
    lines = heading(options)
    for suite in suites:
        lines += table(compared(folders, suite), options.names)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        (RESULTS / f"{options.save}.md").write_text(text, encoding="utf-8")


def compared(folders: Sequence[Path], suite: str) -> Solved:
    """The verdicts of both runs; the base's are those of the first. Exits if the settings differ."""
    settings = [json.loads((folder / suite / "settings.json").read_text()) for folder in folders]
    for key in SAMPLED_ALIKE:
        if settings[0][key] != settings[1][key]:
            raise SystemExit(f"{suite}: {key} is {settings[0][key]} before and {settings[1][key]} after")
    records = []
    adapters: list[set[tuple[str, str]]] = []
    for number, folder in enumerate(folders):
        cells = set()
        for record in verdicts(folder / suite / "verdicts.jsonl"):
            adapter = record["adapter"]
            if adapter == BASE:
                records += [record] if number == 0 else []
                continue
            cells.add((adapter, record["language"]))
            records.append({**record, "adapter": f"{number}:{adapter}"})
        adapters.append(cells)
    both = sorted(adapters[0] & adapters[1], key=lambda cell: (cell[1], cell[0]))
    return Solved(suite, settings[0], Scores(records), both)


def verdicts(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line:
            yield json.loads(line)


def heading(options: argparse.Namespace) -> list[str]:
    facts = environment()
    before, after = options.names
    command = f"python benchmarks/before_after.py {options.before} {options.after} --names {before} {after}"
    if options.save:
        command += f" --save {options.save}"
    return [
        f"# pass@1 after {before} and after {after}",
        "",
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch {facts.packages['torch']}, "
        f"transformers {facts.packages['transformers']}. `{command}` prints this file.",
        "",
        "Differences are paired by problem; intervals (95 %) resample problems. One seed.",
    ]


def table(solved: Solved, names: Sequence[str]) -> list[str]:
    """A table of one suite, with means over languages at its end."""
    scores, settings = solved.scores, solved.settings
    before, after = names
    methods = sorted({method_of(adapter) for adapter, _ in solved.adapters})
    languages = sorted({language for _, language in solved.adapters})
    problems = len(scores.problems((f"0:{solved.adapters[0][0]}", languages[0])))
    samples = min(scores.num_samples((f"0:{adapter}", language)) for adapter, language in solved.adapters)
    lines = [
        "",
        f"## {solved.suite}",
        "",
        f"{problems} problems, {samples} samples at temperature {settings['temperature']:g}, top-p "
        f"{settings['top_p']:g}, at most {settings['max_new_tokens']} tokens, the same seeds.",
        "",
        f"| language | method | base | {before} | {after} | {after} - {before} |",
        "|---|---|---|---|---|---|",
    ]
    for adapter, language in solved.adapters:
        name = load_languages()[language].name
        base = shown(scores.pass_at((BASE, language), 1))
        first = shown(scores.pass_at((f"0:{adapter}", language), 1))
        second = shown(scores.pass_at((f"1:{adapter}", language), 1))
        change = scores.difference(f"1:{adapter}", f"0:{adapter}", language=language, k=1)
        lines.append(f"| {name} | {method_of(adapter)} | {base} | {first} | {second} | {signed(change)} |")
    for method in methods:
        of_method = {lang: adapter for adapter, lang in solved.adapters if method_of(adapter) == method}
        runs = [{lang: f"{number}:{adapter}" for lang, adapter in of_method.items()} for number in (0, 1)]
        base = shown(scores.macro(dict.fromkeys(of_method, BASE), 1))
        first, second = shown(scores.macro(runs[0], 1)), shown(scores.macro(runs[1], 1))
        change = scores.macro_difference(runs[1], runs[0], 1)
        label = f"mean of {len(of_method)}"
        lines.append(f"| {label} | {method} | {base} | {first} | {second} | {signed(change)} |")
    return lines


def method_of(adapter: str) -> str:
    """The family of an adapter named <task>-<family>."""
    return adapter.rsplit("-", 1)[1]


def shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f}"


def signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


if __name__ == "__main__":
    main()
