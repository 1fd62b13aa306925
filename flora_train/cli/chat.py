"""Arguments of `flora-train chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import AllowDifferentBase, Run


@command("RUN [ADAPTER ...] [OPTIONS]")
def chat(
    run: Run,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of adapters that answer beside the base. Default: all, if there are at most 3.",
            metavar="[ADAPTER]...",
            show_default=False,
        ),
    ] = None,
    *,
    system: Annotated[
        str | None, typer.Option(help="A system prompt.", metavar="TEXT", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy. Default: 0.7.", metavar="X", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help="Draw from the likeliest tokens of this total probability. Default: 0.95.",
            metavar="P",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", help="Tokens of an answer. Default: 512.", metavar="N", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed gives the same answers. Default: 0.", metavar="N", show_default=False
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            help="A .jinja file, or the name of a shipped template, instead of the run's.",
            metavar="FILE|NAME",
            show_default=False,
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each text as it is, without a template.")
    ] = False,
    allow_different_base: AllowDifferentBase = False,
) -> None:
    """Talk to the base and to adapters of a run, side by side.

    All answers are generated in one batch. In the conversation, /help lists commands, Ctrl-C stops an
    answer, and Ctrl-D leaves.

    \b
    Example: flora-train chat outputs/quickstart lua-flora lua-lora --temperature 0
    """
    from flora_train.prerequisites import check_saved_run

    check_saved_run(run, with_tasks=False)
    from flora_train.commands.chat import chat_with_run

    chat_with_run(
        run,
        adapters or (),
        system=system,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        chat_template=chat_template,
        plain=plain,
        allow_different_base=allow_different_base,
    )
