"""Arguments of `flora-train push`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import Adapters, AllowDifferentBase, Run


@command("RUN [ADAPTER ...] --repo ORG/NAME [OPTIONS]")
def push(
    run: Run,
    adapters: Adapters = None,
    *,
    repo: Annotated[str, typer.Option(help="The repository.", metavar="ORG/NAME", show_default=False)],
    repo_per_adapter: Annotated[
        bool,
        typer.Option(
            "--repo-per-adapter", help="One repository ORG/NAME-ADAPTER each, and a collection NAME."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Name of the base model on the hub. Default: the recipe's.", metavar="ORG/MODEL"),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Visible to everybody. Default: private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be created; nothing is sent.")
    ] = False,
    pause: Annotated[float, typer.Option(help="Seconds between two repositories.", metavar="SECONDS")] = 1.0,
    allow_different_base: AllowDifferentBase = False,
) -> None:
    """Upload adapters, cards and the report to the hub.

    \b
    Example: flora-train push outputs/quickstart --repo me/code --base HuggingFaceTB/SmolLM2-135M --dry-run
    """
    from flora_train.commands.push import push_run

    push_run(
        run,
        adapters or (),
        repo=repo,
        repo_per_adapter=repo_per_adapter,
        base=base,
        public=public,
        dry_run=dry_run,
        pause=pause,
        allow_different_base=allow_different_base,
    )
