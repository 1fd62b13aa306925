"""Keep a run's report among the results: python benchmarks/keep_report.py RUN [RUN ...]

Writes results/<name of the run>.json and .html. Clips are left out, as their licences may not allow
redistribution. Usage: python benchmarks/keep_report.py --redraw    (writes the .html of the kept reports
again)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flora_train.config.json_format import read_object
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.html import render_html
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.speech.score_types import SpeechResults
from flora_train.runtime.run_folder import RunFolder

RESULTS = Path(__file__).resolve().parent / "results"


def keep(run: str) -> None:
    """Copy the report of one run."""
    report = read_report(RunFolder(Path(run)))
    if report.speech is not None:
        report = report.replace(speech=without_audio(report.speech))
    text = json.dumps(report.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    (RESULTS / f"{report.name}.json").write_text(text, encoding="utf-8")
    write_page(report)


def without_audio(speech: SpeechResults) -> SpeechResults:
    """The same results without embedded clips."""
    languages = []
    for part in speech.languages:
        utterances = [utterance.replace(audio=None) for utterance in part.utterances]
        languages.append(part.replace(utterances=utterances))
    return speech.replace(languages=languages)


def redraw() -> None:
    """Write the pages of all kept reports that have one again."""
    for page in sorted(RESULTS.glob("*.html")):
        content = read_object(page.with_suffix(".json"), "keep the report of a run again")
        write_page(Report.model_validate(content))


def write_page(report: Report) -> None:
    page = RESULTS / f"{report.name}.html"
    page.write_text(render_html(report), encoding="utf-8")
    print(page)


if __name__ == "__main__":
    if sys.argv[1:] == ["--redraw"]:
        redraw()
    for run in sys.argv[1:]:
        if run != "--redraw":
            keep(run)
