"""Arguments of `flora-train plan`."""

from __future__ import annotations

from flora_train.cli.app import command
from flora_train.cli.arguments import RecipeOverrides


@command("recipe=NAME [KEY=VALUE ...]", free_form=True)
def plan(overrides: RecipeOverrides = None) -> None:
    """Print the memory, disk and time that a run needs.

    \b
    Example: flora-train plan recipe=quickstart adapters.device_slots=6
    """
    from flora_train.config.load import load_config

    config = load_config(overrides or [])
    from flora_train.commands.plan import plan_run

    plan_run(config)
