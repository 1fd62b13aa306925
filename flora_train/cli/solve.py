"""Arguments of `flora-train solve`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import AllowDifferentBase, Languages, Run, RunOverrides, split_list


@command("RUN [evaluation.KEY=VALUE ...] [OPTIONS]", overrides=True)
def solve(
    run: Run,
    overrides: RunOverrides = None,
    *,
    languages: Languages = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            help="Other PEFT adapters, folders or hub names, for the same problems.", metavar="DIR,..."
        ),
    ] = None,
    multipl_e: Annotated[
        str | None,
        typer.Option(
            "--multipl-e", help="Also write the completions in MultiPL-E's layout.", metavar="FOLDER"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder of completions, verdicts and scores. Default: eval/ of the run.", metavar="FOLDER"
        ),
    ] = None,
    allow_different_base: AllowDifferentBase = False,
) -> None:
    """Solve programming problems with a run's adapters.

    \b
    Example: flora-train solve outputs/quickstart evaluation.problems=starter evaluation.num_samples=20
    """
    from flora_train.prerequisites import check_saved_run

    check_saved_run(run, overrides or (), with_tasks=False, adapters=split_list(contenders) or ())
    from flora_train.commands.solve import solve_run

    solve_run(
        run,
        overrides or (),
        languages=split_list(languages),
        contenders=split_list(contenders),
        multipl_e=multipl_e,
        out=out,
        allow_different_base=allow_different_base,
    )
