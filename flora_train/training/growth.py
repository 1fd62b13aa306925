"""How do tasks join a run that has ended? Its adapters are as they were kept, and learn no more; the run goes on with the others."""

from __future__ import annotations

import json
from typing import Any

from flora_train.training.adapter_file import load_adapter
from flora_train.training.departures import Departure
from flora_train.training.distributed import is_main_process, say, wait_for_everyone
from flora_train.training.run_folder import open_run
from flora_train.training.selection import Kept
from flora_train.training.trainer import Trainer


def grow(trainer: Trainer) -> None:
    """Let a trainer whose run folder holds a finished run begin after its last step, with a checkpoint of that. Call it before the
    folder is claimed: a kill then leaves the run as it was, finished. Raises UserError if a kept adapter is missing."""
    folder, bank = trainer.folder, trainer.bank
    _, before = open_run(folder.path)
    known = [i for i, spec in enumerate(bank.specs) if spec.task in before.tasks]
    steps = folder.read_metrics("step")
    done = max(record["step"] for record in steps)
    trainer.at.done = trainer.at.logged = trainer.at.evaluated = done
    trainer.at.seconds = steps[-1]["seconds"]
    seconds = json.loads(folder.run_json.read_text(encoding="utf-8"))["training"]["seconds"]
    trainer.at.evaluation_seconds = seconds["evaluate during training"]
    latest: dict[str, Any] = {}
    for record in steps:
        latest |= record["adapters"]
    for adapter in known:
        name = bank.specs[adapter].name
        facts = load_adapter(bank, adapter, folder.kept)
        trainer.selection.kept[adapter] = Kept(facts["step"], facts["heldout_loss"])
        trainer.departures.gone[adapter] = Departure(done, "finished")
        trainer.tally.tokens[adapter] = latest.get(name, {}).get("tokens", 0)
    trainer.tally.task_tokens.update(steps[-1]["task_tokens"])
    trainer.joined = {task: 0 if task in before.tasks else done for task in trainer.tasks}
    trainer.foresee()
    joining = [task for task, step in trainer.joined.items() if step == done]
    say(f"{', '.join(joining)} join after step {done}; {len(known)} adapters stay as they are")
    trainer.save()
    if is_main_process():
        trainer.checkpoints.wait()
    wait_for_everyone()
