"""Arguments of `flora-train init`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command


@command("FILE_OR_FOLDER ... [OPTIONS]")
def init(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Data files, folders of text or code, folders LANGUAGE/clips.tsv.", metavar="FILE_OR_FOLDER"
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="The base model: a folder, or a name on the hub.", metavar="MODEL", show_default=False
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(help="The recipe. Default: NAME.yaml.", metavar="RECIPE.yaml", show_default=False),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Language of clips, as Whisper writes it: cs, nl, ...", metavar="CODE", show_default=False
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the run. Default: that of the recipe's file.", metavar="NAME", show_default=False
        ),
    ] = None,
) -> None:
    """Write a commented recipe for your own files.

    \b
    Example: flora-train init data/support.jsonl src --model assets/models/smollm2-135m --out mine.yaml
    """
    from flora_train.commands.init import init_recipe

    init_recipe(sources, model=model, out=out, language=language, name=name)
