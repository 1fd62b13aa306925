"""Arguments of `flora-train execute`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import Languages, split_list


@command("COMPLETIONS [OPTIONS]")
def execute(
    completions: Annotated[
        str,
        typer.Argument(
            help="JSON lines of completions, or a folder in MultiPL-E's layout.", metavar="COMPLETIONS"
        ),
    ],
    *,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Folder of MultiPL-E's prompt files, if the completions lack their problems.",
            metavar="FOLDER",
        ),
    ] = None,
    languages: Languages = None,
    pass_at_k: Annotated[
        list[str] | None, typer.Option("--pass-at-k", help="pass@k for these k. Default: 1.", metavar="K,...")
    ] = None,
    sandbox: Annotated[
        str, typer.Option(help="bubblewrap, or none, which runs programs unconfined.", metavar="NAME")
    ] = "bubblewrap",
    workers: Annotated[
        int | None,
        typer.Option(help="Programs that run at a time. Default: the machine's cores.", metavar="N"),
    ] = None,
    cpu_seconds: Annotated[
        float | None,
        typer.Option(
            "--cpu-seconds", help="CPU time of one program. Default: that of its language.", metavar="S"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Verdicts. Default: NAME.verdicts.jsonl beside the completions.", metavar="FILE"),
    ] = None,
) -> None:
    """Run generated programs in the sandbox, and print pass@k.

    \b
    Example: flora-train execute completions.jsonl --prompts multipl_e --pass-at-k 1,10
    """
    from flora_train.commands.execute import execute_completions

    samples = None
    if pass_at_k is not None:
        samples = list(map(_number, split_list(pass_at_k) or ()))
    execute_completions(
        completions,
        prompts=prompts,
        languages=split_list(languages),
        pass_at_k=samples,
        sandbox=sandbox,
        workers=workers,
        cpu_seconds=cpu_seconds,
        out=out,
    )


def _number(text: str) -> int | str:
    """A whole number, or the text that is not one, for the error."""
    return int(text) if text.isdecimal() else text
