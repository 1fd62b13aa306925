"""flora-train report: draw a run's report again, or several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flora_train.config.base import ConfigModel, PathText
from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.overrides import from_flags, parse_words
from flora_train.config.terminal_text import print_plain
from flora_train.evaluation.report import write_comparison, write_report
from flora_train.evaluation.report.comparison import labels, measures, seed_groups, verdicts, with_seeds
from flora_train.evaluation.report.html import render_comparison
from flora_train.evaluation.report.results import read_report, reading_report
from flora_train.runtime.run_folder import open_run


class ReportOptions(ConfigModel):
    out: PathText | None = None
    """Several runs only: the page, a name that ends in .html. Default: comparison.html beside the first run."""


def draw_reports(words: Sequence[str]) -> None:
    """words: a run or more, and ReportOptions. Nothing is judged again. Raises UserError."""
    runs, raw = from_flags(words)
    options = read_options(ReportOptions, parse_words(raw))
    if not runs:
        raise user_error("run", None, "say which: a folder in outputs/")
    folders = [open_run(run)[0] for run in runs]
    reports = [read_report(folder) for folder in folders]
    if len(runs) == 1:
        if options.out is not None:
            raise user_error("out", options.out, "is for several runs beside each other; one has its page in its folder")
        folders[0].lock()
        try:
            with reading_report(folders[0].evaluation / "report.json"):
                page = write_report(reports[0], folders[0].evaluation)
            print_plain(page)
        finally:
            folders[0].unlock()
        return
    named = dict(zip(labels(runs), reports, strict=True))
    page = Path(runs[0]).resolve().parent / "comparison.html" if options.out is None else Path(options.out)
    if page.suffix != ".html":
        raise user_error("out", options.out, "is a page: give it a name that ends in .html")
    for folder, report in zip(folders, reports, strict=True):  # which one is damaged
        with reading_report(folder.evaluation / "report.json"):
            render_comparison({"": report})
    with reading_report(folders[0].evaluation / "report.json"):
        write_comparison(named, page)
        print_plain(verdicts(with_seeds(list(named), reports), measures(reports), seed_groups(reports)))
    print_plain(page)
