"""Arguments of `flora-train doctor`."""

from __future__ import annotations

from flora_train.cli.app import command
from flora_train.cli.arguments import RecipeOverrides


@command("[recipe=NAME KEY=VALUE ...]", free_form=True)
def doctor(overrides: RecipeOverrides = None) -> None:
    """Print what this machine, or a recipe on it, can run.

    \b
    Example: flora-train doctor recipe=quickstart adapters.flora.rank=16
    """
    if not overrides:
        from flora_train.commands.doctor import check_machine

        check_machine()
        return
    from flora_train.config.load import load_config

    config = load_config(overrides)
    from flora_train.prerequisites.doctor import checked_recipe

    with checked_recipe(config):
        from flora_train.commands.doctor import check_recipe

        check_recipe(config)
