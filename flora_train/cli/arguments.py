"""Arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Run = Annotated[
    str, typer.Argument(help="The folder of a run, in outputs/.", metavar="RUN", show_default=False)
]
Adapters = Annotated[
    list[str] | None,
    typer.Argument(help="Names of adapters. Default: all.", metavar="[ADAPTER]...", show_default=False),
]
RecipeOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="A recipe (a name, a YAML file or the folder of a run), and keys to change in it.",
        metavar="recipe=NAME [KEY=VALUE]...",
        show_default=False,
    ),
]
RunOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys of the run's recipe to change: evaluation.* and tasks.*.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
AllowDifferentBase = Annotated[
    bool,
    typer.Option(
        "--allow-different-base", help="Accept another base than the run was trained on. Results say so."
    ),
]
AllowDifferentData = Annotated[
    bool,
    typer.Option(
        "--allow-different-data", help="Accept other rows than the run was trained on. Results say so."
    ),
]
Languages = Annotated[
    list[str] | None,
    typer.Option(help="Programming languages. Default: all.", metavar="LANGUAGE,...", show_default=False),
]


def split_list(values: list[str] | None) -> list[str] | None:
    """The items of comma-separated values, of an option that may be given several times."""
    if values is None:
        return None
    items = ",".join(value.strip("[]") for value in values).split(",")
    return [item.strip() for item in items if item.strip()]
