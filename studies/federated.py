"""The table of recipe=federated_local at several alphas: does SLoRA close the gap to full fine-tuning?

    make federated-study                    runs alpha 0.1, 1 and 100 with three seeds each, then this
    python studies/federated.py [RUN ...]   prints the table of finished runs; --save writes
                                            benchmarks/results/federated_cpu.md and federated_cpu.svg

Without RUN, all finished runs in outputs/federated_<clients>_<alpha> are read. Learning rates come from
studies/federated_rates.py, which never reads the test texts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from federated_study.figure import write_figure
from federated_study.runs import StudyError, StudyRun, finished_runs, read_runs
from federated_study.table import write_tables

from flora_train.config.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ROOT / "outputs"
RESULT = ROOT / "benchmarks" / "results" / "federated_cpu.md"


def heading(runs: Sequence[StudyRun]) -> Iterator[str]:
    """What was measured, and on which machine."""
    report = runs[0].report
    versions = ", ".join(f"{name} {report.packages[name]}" for name in ("torch", "transformers"))
    yield "# Federated strategies by how alike the clients are"
    yield ""
    yield (
        f"{report.machine}; {versions}. recipe=federated_local: {Path(report.model).name} in {report.dtype}, "
        f"chapters of ICD-10-CM; {report.rounds} rounds of {report.local}. "
        "`python studies/federated.py --save` prints this file."
    )
    yield ""


def text_of(runs: Sequence[StudyRun], figure: str) -> str:
    """The whole file. figure: path of the figure, from the file."""
    lines = [*heading(runs), *write_tables(runs), "", f"![accuracy by round]({figure})"]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="default: all that have finished")
    parser.add_argument("--save", action="store_true", help="write the result and its figure")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file (default: %(default)s)")
    options = parser.parse_args(arguments)
    figure = options.result.with_suffix(".svg")
    try:
        runs = read_runs(options.runs or finished_runs(OUTPUTS))
        text = text_of(runs, figure.name)
        print(text)
        if options.save:
            write_figure(runs, figure)
            options.result.write_text(text, encoding="utf-8")
    except (StudyError, UserError, OSError) as error:
        print(f"federated: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
