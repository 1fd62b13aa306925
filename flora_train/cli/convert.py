"""Arguments of `flora-train convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command


@command("PEFT_LORA --out FOLDER [OPTIONS]")
def convert(
    adapter: Annotated[
        str,
        typer.Argument(help="A LoRA in PEFT's format: a folder, or a name on the hub.", metavar="PEFT_LORA"),
    ],
    *,
    out: Annotated[
        str, typer.Option(help="Folder of the new adapter.", metavar="FOLDER", show_default=False)
    ],
    rank: Annotated[int, typer.Option(help="Rank of the fLoRA.", metavar="N")] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="The base model. Default: the one that the adapter names.", metavar="MODEL"),
    ] = None,
) -> None:
    """Make a fLoRA that is close to a LoRA, and print how close.

    \b
    Example: flora-train convert outputs/quickstart/adapters/lua-lora --out outputs/lua-flora --rank 8
    """
    from flora_train.commands.convert import convert_adapter

    convert_adapter(adapter, out=out, rank=rank, model=model)
