"""Arguments of `flora-train serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import AllowDifferentBase


@command("RUN [ADAPTER ...] [OPTIONS] [-- VLLM_OPTIONS]", free_form=True)
def serve(
    run: Annotated[
        str,
        typer.Argument(
            help="The folder of a run, a folder of adapters, or a hub repository ORG/NAME[@REVISION].",
            metavar="RUN",
            show_default=False,
        ),
    ],
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of adapters. Default: all. Then options of vLLM.",
            metavar="[ADAPTER]...",
            show_default=False,
        ),
    ] = None,
    *,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; 0.0.0.0 is every one. Default: 127.0.0.1.",
            metavar="ADDRESS",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="0 is any free one. Default: 8000.", metavar="N", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model of adapters without a run. Default: the one that they name.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare log-probabilities with the trainer's own before the server is announced."
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference that --check allows. Default: 1e-3 in float32, 1 in bfloat16.",
            metavar="X",
            show_default=False,
        ),
    ] = None,
    on_demand: Annotated[
        bool,
        typer.Option("--on-demand", help="Load adapters when they are first requested, but for those named."),
    ] = False,
    allow_loading: Annotated[
        bool,
        typer.Option(
            "--allow-loading", help="Let every client load and unload adapters of any folder of this machine."
        ),
    ] = False,
    allow_different_base: AllowDifferentBase = False,
) -> None:
    """Serve the base and adapters of a run with vLLM, mixed in one batch.

    Options that are not listed here, and everything after --, are passed on to vLLM. Ctrl-C ends the server.

    \b
    Example: flora-train serve outputs/quickstart lua-flora lua-lora --port 8001 --check
    """
    from flora_train.commands.serve import serve_run

    serve_run(
        run,
        adapters or (),
        host=host,
        port=port,
        base=base,
        check=check,
        tolerance=tolerance,
        on_demand=on_demand,
        allow_loading=allow_loading,
        allow_different_base=allow_different_base,
    )
