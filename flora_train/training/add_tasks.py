"""How do tasks join a run that has ended? Its adapters are as they were kept, and learn no more; the run goes on with the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from flora_train.config.errors import UserError, user_error
from flora_train.config.schema import RunConfig
from flora_train.runtime.distributed import on_every_process
from flora_train.runtime.run_folder import differences, open_run
from flora_train.training.best_adapters import BestCheckpoint, load_best
from flora_train.training.early_stopping import Retirement
from flora_train.training.trainer import Trainer

logger = logging.getLogger(__name__)


def grow(trainer: Trainer, start: Callable[[Collection[int]], None]) -> None:
    """Let a trainer whose run folder holds a finished run begin after its last step, with a checkpoint of that. Call it before the
    folder is claimed: a kill then leaves the run as it was, finished. start: gives adapters that join the numbers they begin with.

    Raises UserError if a kept adapter is missing, or was trained on another base or other data.
    """
    folder, bank = trainer.folder, trainer.bank
    before, facts, kept = on_every_process(lambda: _read_ended(trainer))
    ended = facts["ended"]
    steps = folder.read_metrics("step")
    if not steps:
        raise user_error(str(folder.metrics), None, "has no record of the run's steps: put it back from a copy")
    done = max(record["step"] for record in steps)
    trainer.state.step = trainer.state.logged = trainer.state.evaluated = done
    trainer.state.seconds = steps[-1]["seconds"]
    trainer.state.evaluation_seconds = facts["training"]["seconds"]["evaluate during training"]
    latest: dict[str, Any] = {}
    for record in steps:
        latest |= record["adapters"]
    trainer.selection.kept |= kept
    for adapter in kept:
        name = bank.specs[adapter].name
        trainer.early_stopping.retired[adapter] = Retirement(done, "finished")
        trainer.metrics.tokens[adapter] = latest.get(name, {}).get("tokens", 0)
    trainer.metrics.task_tokens.update(steps[-1]["task_tokens"])
    for name, spoilt in steps[-1].get("quarantined", {}).items():
        trainer.guard.quarantined[bank.ids[name]] = spoilt["step"], spoilt["why"]
    trainer.joined = {task: ended["joined"].get(task, done) for task in trainer.tasks}
    trainer.replan()
    start([i for i, spec in enumerate(bank.specs) if spec.task not in before.tasks])
    joining = [task for task, step in trainer.joined.items() if step == done]
    logger.info(f"{', '.join(joining)} join after step {done}; {len(kept)} adapters stay as they are")
    trainer.save()
    trainer.finish_saving()


def _read_ended(trainer: Trainer) -> tuple[RunConfig, dict[str, Any], dict[int, BestCheckpoint]]:
    """The finished run's configuration, its run.json, and its adapters, which are in the bank then."""
    folder, bank = trainer.folder, trainer.bank
    _, before = open_run(folder.path)
    facts = folder.facts()
    if "ended" not in facts:
        raise user_error(
            "output_dir", str(folder.path), "was finished by an older version, which kept too little to add tasks to it"
        )
    now = trainer.identity([task for task in trainer.tasks if task not in before.tasks])
    if problems := differences(facts["ended"]["identity"], now, f"when the run in {folder.path} ended"):
        raise UserError(*problems)
    known = [i for i, spec in enumerate(bank.specs) if spec.task in before.tasks]
    return before, facts, load_best(bank, known, folder.best_adapters)
