"""Keep a run's report among the results: python benchmarks/keep_report.py RUN [RUN ...]

Writes results/<name of the run>.json and .html. Clips are left out: what they are played from may not be passed on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flora_train.evaluation.report.html import render_html
from flora_train.evaluation.report.results import read_report
from flora_train.runtime.run_folder import RunFolder

RESULTS = Path(__file__).resolve().parent / "results"


def keep(run: str) -> None:
    """Copy one run's report."""
    results = read_report(RunFolder(Path(run)))
    for part in (results["speech"] or {"languages": []})["languages"]:
        for utterance in part["utterances"]:
            utterance["audio"] = None
    (RESULTS / f"{results['name']}.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (RESULTS / f"{results['name']}.html").write_text(render_html(results), encoding="utf-8")
    print(RESULTS / f"{results['name']}.html")


if __name__ == "__main__":
    for run in sys.argv[1:]:
        keep(run)
