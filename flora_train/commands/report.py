"""flora-train report: draw a run's report again, or compare several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flora_train.config.errors import user_error
from flora_train.config.terminal_text import print_plain
from flora_train.evaluation.report.comparison import labels, measures, seed_groups, verdicts, with_seeds
from flora_train.evaluation.report.files import read_report, write_comparison, write_report
from flora_train.evaluation.report.joined_seeds import with_joined_seeds
from flora_train.evaluation.report.published import load_published
from flora_train.evaluation.report.published_rows import ComparedTable, beside_published
from flora_train.evaluation.report.published_tables import write_compared
from flora_train.evaluation.report.tables import check_table_name, write_table
from flora_train.evaluation.report.terminal import print_published
from flora_train.evaluation.report.types import Report
from flora_train.federated.build_report import read_federated_report
from flora_train.federated.report_page import write_page
from flora_train.federated.report_terminal import print_federated
from flora_train.runtime.run_folder import FEDERATED_RESULTS, RunFolder, is_federated, open_run_folder


def write_reports(
    runs: Sequence[str], *, out: str | None = None, table: str | None = None, beside: str | None = None
) -> None:
    """Write the report of one run again, or one page that compares several runs. Nothing is evaluated.

    out: the page of several runs, which ends in .html. Default: comparison.html beside the first run. table:
    a file of the results, which ends in .csv, .md or .tex. beside: `paper`, or a file of published results,
    which are printed and drawn beside those of one run; the table is then of these. A
    federated run is given alone. Raises UserError.
    """
    if table is not None:
        check_table_name(Path(table))
    if beside is not None and len(runs) > 1:
        raise user_error("beside", beside, "is for one run: give one folder")
    published = None if beside is None else load_published(beside)
    folders = [open_run_folder(run) for run in runs]
    if any(map(is_federated, folders)):
        _check_federated(folders, out=out, table=table, beside=beside)
        print_plain(_rewrite_federated(folders[0]))
        return
    reports = [read_report(folder) for folder in folders]
    compared: list[ComparedTable] = []
    if published is not None:
        compared = beside_published(with_joined_seeds(reports[0]), published, run=runs[0], name=str(beside))
    if len(runs) == 1:
        if out is not None:
            raise user_error("out", out, "is for several runs; the page of one run is in its folder")
        page = _rewrite(folders[0], reports[0], compared)
        print_published(compared)
    else:
        page = _compare(runs, reports, out)
    print_plain(page)
    if table is not None:
        if compared:
            write_compared(compared, Path(table))
        else:
            write_table(dict(zip(labels(runs), reports, strict=True)), Path(table))
        print_plain(table)


def _check_federated(
    folders: Sequence[RunFolder], *, out: str | None, table: str | None, beside: str | None
) -> None:
    """Raises UserError where a federated run is to be compared, or written as something else than its
    page."""
    if len(folders) > 1:
        federated = next(folder for folder in folders if is_federated(folder))
        hint = "is a federated run, whose strategies are compared on its own page: give its folder alone"
        raise user_error("run", str(federated.path), hint)
    for key, value in (("out", out), ("table", table), ("beside", beside)):
        if value is not None:
            hint = f"is not for federated runs: leave it out. The figures are in {FEDERATED_RESULTS}"
            raise user_error(key, value, hint)


def _rewrite_federated(folder: RunFolder) -> Path:
    """The page of a federated run, written again; prints its tables."""
    report = read_federated_report(folder)
    folder.lock()
    try:
        page = write_page(report, folder.evaluation)
    finally:
        folder.unlock()
    print_federated(report)
    return page


def _rewrite(folder: RunFolder, report: Report, compared: Sequence[ComparedTable]) -> Path:
    """The report of one run, written again."""
    folder.lock()
    try:
        return write_report(report, folder.evaluation, compared)
    finally:
        folder.unlock()


def _compare(runs: Sequence[str], reports: Sequence[Report], out: str | None) -> Path:
    """The page that compares runs; prints which contenders are better."""
    page = Path(runs[0]).resolve().parent / "comparison.html"
    if out is not None:
        page = Path(out)
    if page.suffix != ".html":
        raise user_error("out", out, "is a page: give it a name that ends in .html")
    named = dict(zip(labels(runs), reports, strict=True))
    write_comparison(named, page)
    joined = [with_joined_seeds(report) for report in reports]
    print_plain(verdicts(with_seeds(list(named), joined), measures(joined), seed_groups(joined)))
    return page
