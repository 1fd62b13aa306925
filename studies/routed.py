"""The table of recipe=routed_local: held-out bits per byte of each language, of one mixture without task id.

    python studies/routed.py RUN            prints the table; --save writes benchmarks/results/routed_cpu.md

Losses are computed again, document by document, from the run's adapters, and compared with the run's report.
Intervals resample documents within each language, the same for all methods; differences are paired.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import flora_train.cli  # noqa: F401

# isort: split
import torch
from routed_study.heldout import Heldout, StudyError, largest_difference, read_heldout, report_of
from routed_study.table import CONFIDENCE, SAMPLES, write_tables

from flora_train.config.errors import UserError
from flora_train.evaluation.report.types import Report
from flora_train.runtime.environment import available_cpus, environment

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "outputs" / "routed_local"
RESULT = ROOT / "benchmarks" / "results" / "routed_cpu.md"


def heading(report: Report) -> Iterator[str]:
    """What was measured, and on which machine."""
    facts = environment()
    versions = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "transformers"))
    seconds = report.facts.seconds
    yield "# One mixture of nine languages, without task id: shared, routed and gated adapters"
    yield ""
    yield f"{facts.machine.processor}, {facts.machine.cpus} CPUs; {versions}; commit {facts.commit}."
    yield (
        f"recipe={report.name}, {Path(report.facts.model).name} in {report.facts.dtype}; trained in "
        f"{sum(seconds.values()):.0f} s in all. `python studies/routed.py outputs/{report.name} --save` "
        "prints this file."
    )
    yield ""
    yield (
        f"Intervals ({CONFIDENCE:.0%}) resample documents within each language ({SAMPLES:,} times, the same "
        "for all methods); differences are paired by document. Lower is better; the mean counts every "
        "language alike. Values are means over seeds, which differ in the initialisation, not in the texts. "
        "The members of MeteoRA were trained before, each on 20 texts of its language: 180 together, half as "
        "many again as an adapter here reads; its parameters include theirs, which do not change."
    )
    yield ""


def text_of(heldout: Heldout, report: Report) -> str:
    """The whole file."""
    difference = largest_difference(heldout, report)
    agreement = (
        "Bits per byte of all documents together, which report.json has, differ from the losses that these "
        f"tables are made of by {difference:.2g} at most."
    )
    return "\n".join([*heading(report), *write_tables(heldout), "", agreement]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=RUN, help="default: outputs/routed_local")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--threads", type=int, default=available_cpus())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        text = text_of(read_heldout(options.run), report_of(options.run))
    except (StudyError, UserError, OSError) as error:
        print(f"routed: {error}", file=sys.stderr)
        return 1
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
