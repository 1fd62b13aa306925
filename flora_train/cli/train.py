"""Arguments of `flora-train train`."""

from __future__ import annotations

import logging
from itertools import chain

from flora_train.cli.app import command
from flora_train.cli.arguments import RecipeOverrides

logger = logging.getLogger(__name__)


@command("recipe=NAME [KEY=VALUE ...]", free_form=True)
def train(overrides: RecipeOverrides = None) -> None:
    """Train, evaluate, report and export one run.

    With resume=true, a run that was interrupted continues, and a finished one is kept.

    \b
    Example: flora-train train recipe=quickstart training.steps=20 output_dir=outputs/short
    """
    from flora_train.config.load import load_config

    config = load_config(overrides or [])
    chosen = (adapter.tasks or config.tasks for adapter in config.adapters.values())
    tasks = len(set(chain.from_iterable(chosen)))
    logger.info(f"{config.name}: {tasks} tasks, base {config.model.path}, run folder {config.folder}")
    from flora_train.runtime.signals import end_with_launcher

    end_with_launcher()
    from flora_train.prerequisites import check_prerequisites, spans_machines

    if not spans_machines():
        check_prerequisites(config)
    # torch loads only once the recipe is known to be valid, and what it needs to be available
    from flora_train.commands.train import train_checked

    train_checked(config)
