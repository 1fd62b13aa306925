"""Arguments of `flora-train report`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command


@command("RUN [RUN ...] [OPTIONS]")
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Folders of runs, in outputs/.", metavar="RUN...", show_default=False)
    ],
    *,
    out: Annotated[
        str | None,
        typer.Option(
            help="Page of several runs. Default: comparison.html beside the first.", metavar="FILE.html"
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="Write the results as a table: .csv, .md or .tex (LaTeX, booktabs).", metavar="FILE"
        ),
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(
            help="Show published results beside those of one run: the word paper, for the fLoRA paper's "
            "tables, or a YAML file of the same form.",
            metavar="paper|FILE.yaml",
        ),
    ] = None,
) -> None:
    """Write a run's report again, compare several runs, or show published results beside one.

    Nothing is evaluated.

    \b
    Example: flora-train report outputs/quickstart outputs/quickstart_sweep --table results.md
             flora-train report outputs/multipl_e --beside paper
    """
    from flora_train.commands.report import write_reports

    write_reports(runs, out=out, table=table, beside=beside)
