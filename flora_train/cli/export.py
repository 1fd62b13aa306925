"""Arguments of `flora-train export`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import Adapters, AllowDifferentBase, AllowDifferentData, Run


@command("RUN [ADAPTER ...] [OPTIONS]")
def export(
    run: Run,
    adapters: Adapters = None,
    *,
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="peft: PEFT's own formats, exact. flora: fLoRA for PEFT with flora_train.peft_plugin. "
            "merged: plain models with the adapter folded in. lora-svd: the closest LoRA, for servers that "
            "accept nothing else. mixlora: MixLoRA's published layout.",
            metavar="peft|flora|merged|lora-svd|mixlora",
        ),
    ] = "peft",
    rank: Annotated[int | None, typer.Option(help="lora-svd: its rank. Default: 64.", metavar="N")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", help="lora-svd: the smallest rank with at most this relative error.", metavar="X"
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder for the adapters' folders. Default: in the run.", metavar="FOLDER"),
    ] = None,
    allow_different_base: AllowDifferentBase = False,
    allow_different_data: AllowDifferentData = False,
) -> None:
    """Write adapters of a run for other programs.

    \b
    Example: flora-train export outputs/quickstart lua-flora --as lora-svd --max-error 0.2
    """
    from flora_train.commands.export import export_adapters
    from flora_train.config.terminal_text import print_plain

    folders = export_adapters(
        run,
        adapters or (),
        as_=as_,
        rank=rank,
        max_error=max_error,
        out=out,
        allow_different_base=allow_different_base,
        allow_different_data=allow_different_data,
    )
    print_plain(*folders)
