"""Arguments of `flora-train evaluate`."""

from __future__ import annotations

from flora_train.cli.app import command
from flora_train.cli.arguments import AllowDifferentBase, AllowDifferentData, Run, RunOverrides


@command("RUN [evaluation.KEY=VALUE tasks.TASK.KEY=VALUE ...] [OPTIONS]", overrides=True)
def evaluate(
    run: Run,
    overrides: RunOverrides = None,
    *,
    allow_different_base: AllowDifferentBase = False,
    allow_different_data: AllowDifferentData = False,
) -> None:
    """Evaluate a run again, also on other data.

    Results with other keys go to a folder of their own in the run.

    \b
    Example: flora-train evaluate outputs/quickstart tasks.lua.validation=held_out.jsonl
    """
    from flora_train.prerequisites import check_saved_run

    check_saved_run(run, overrides or (), with_tasks=True)
    from flora_train.commands.evaluate import evaluate_and_show
    from flora_train.training.origin import OriginOptions

    allow = OriginOptions(
        allow_different_base=allow_different_base, allow_different_data=allow_different_data
    )
    evaluate_and_show(run, overrides or (), allow=allow)
