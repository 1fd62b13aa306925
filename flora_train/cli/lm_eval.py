"""Arguments of `flora-train lm-eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from flora_train.cli.app import command
from flora_train.cli.arguments import Adapters, AllowDifferentBase, Run, split_list


@command("RUN [ADAPTER ...] --tasks TASK,... [OPTIONS]")
def lm_eval(
    run: Run,
    adapters: Adapters = None,
    *,
    tasks: Annotated[
        list[str],
        typer.Option(
            help="Tasks, groups or tags of lm_eval, or YAML files.", metavar="TASK,...", show_default=False
        ),
    ],
    include_path: Annotated[
        str | None,
        typer.Option(
            "--include-path", help="A folder with tasks of your own.", metavar="FOLDER", show_default=False
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            help="Examples in a prompt. Default: the task's.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="Documents of a task, or a share below 1.", metavar="N", show_default=False),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Write prompts with the tokenizer's chat template.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(help="Write lm_eval's results as JSON.", metavar="FILE", show_default=False),
    ] = None,
    allow_different_base: AllowDifferentBase = False,
) -> None:
    """Evaluate base and adapters with lm-evaluation-harness.

    All of them are evaluated in one pass over the requests. The tables are lm_eval's own.

    \b
    Example: flora-train lm-eval outputs/quickstart --tasks arc_easy,lambada_openai
    """
    from flora_train.prerequisites import check_saved_run

    check_saved_run(run, with_tasks=False)
    from flora_train.commands.lm_eval import lm_eval_run

    lm_eval_run(
        run,
        adapters or (),
        tasks=split_list(tasks),
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        output=output,
        allow_different_base=allow_different_base,
    )
