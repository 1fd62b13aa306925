"""Arguments of `flora-train data`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import RecipeOverrides, split_list


@command("recipe=NAME [KEY=VALUE ...] [OPTIONS]", recipe=True)
def data(
    overrides: RecipeOverrides = None,
    *,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Tasks. Default: all.", metavar="TASK,...", show_default=False),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            help="Examples of each task that are printed. Default: 2.", metavar="N", show_default=False
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Print long examples in full.")] = False,
) -> None:
    """Print what a run will learn: counts of each task, and examples.

    The learnt part of an example is highlighted. The base model's weights are not loaded.

    \b
    Example: flora-train data recipe=quickstart --task lua --examples 3
    """
    from flora_train.config.load import load_config

    config = load_config(overrides or [])
    from flora_train.commands.data import preview_data

    preview_data(config, tasks=split_list(task), examples=examples, full=full)
