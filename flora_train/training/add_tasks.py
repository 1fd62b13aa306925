"""Adds tasks to a finished run: its adapters stay unchanged, and the run continues with those of the new
tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flora_train.config.errors import UserError, user_error
from flora_train.runtime.config_changes import differences
from flora_train.runtime.metric_records import AdapterMetrics, StoppedAdapter
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.training.best_adapters import BestCheckpoint, load_best
from flora_train.training.checkpoint import Identity
from flora_train.training.context import TrainingContext
from flora_train.training.early_stopping import Retirement
from flora_train.training.train_state import TrainState, by_name


@dataclass(frozen=True)
class FinishedRun:
    """The end of a finished run, whose best adapters are in the bank."""

    progress: TrainState
    joined: Mapping[str, int]
    """Task -> the first step with it, counted from 0."""
    best: Mapping[str, BestCheckpoint]
    """Adapter name -> its best state."""
    tokens: Mapping[str, int]
    """Adapter name -> tokens it was trained on."""
    task_tokens: Mapping[str, int]
    quarantined: Mapping[str, StoppedAdapter]
    """Adapter name -> step and reason."""

    def state_dict(self) -> dict[str, Any]:
        """The state of a Trainer at the end of the run, in which all adapters have retired."""
        retired = {name: asdict(Retirement(self.progress.step, "finished")) for name in self.best}
        tokens = {name: self.tokens.get(name, 0) for name in self.best}
        return {
            "progress": asdict(self.progress),
            "joined": self.joined,
            "optimizer": {"steps": {}},
            "best": {name: asdict(best) for name, best in self.best.items()},
            "early_stopping": {"retired": retired, "patience": {"best": {}, "waited": {}}},
            "guard": {"losses": {}, "rolled_back": {}, "quarantined": self.quarantined},
            "metrics": {
                "tokens": tokens,
                "skipped": {},
                "task_tokens": self.task_tokens,
                "gradient_bytes_sent": 0,
                "recent_loss_sums": {},
                "recent_counts": {},
                "recent_rewards": {},
                "last_steps": {},
            },
        }


def read_finished_run(
    context: TrainingContext, identity: Callable[[Collection[str]], Identity]
) -> FinishedRun:
    """Read the finished run in the context's folder and load its best adapters into the bank.

    identity: of the present run without the named tasks. Raises UserError if an adapter is missing, or was
    trained on another base or other data.
    """
    folder, bank = context.folder, context.bank
    _, config_then = open_run(folder.path)
    run = folder.facts()
    if run.ended is None:
        hint = "was finished by an older version, which recorded too little to add tasks to it"
        raise user_error("output_dir", str(folder.path), hint)
    added = [task for task in context.tasks if task not in config_then.tasks]
    if problems := differences(run.ended.identity, identity(added), f"when the run in {folder.path} ended"):
        raise UserError(*problems)
    known = [adapter for adapter, spec in enumerate(bank.specs) if spec.task in config_then.tasks]
    best = load_best(bank, known, folder.best_adapters)
    seconds = run.training.evaluation_seconds
    return _from_metrics(folder, seconds, joined=run.ended.joined, best=by_name(best, bank.specs))


def _from_metrics(
    folder: RunFolder,
    evaluation_seconds: float,
    *,
    joined: Mapping[str, int],
    best: Mapping[str, BestCheckpoint],
) -> FinishedRun:
    records = folder.read_metrics("step")
    if not records:
        raise user_error(
            str(folder.metrics), None, "has no record of the run's steps: put it back from a copy"
        )
    last, step = records[-1], max(record["step"] for record in records)
    latest: dict[str, AdapterMetrics] = {}
    for record in records:
        latest |= record["adapters"]
    return FinishedRun(
        progress=TrainState(step, step, step, last["seconds"], evaluation_seconds),
        joined=joined,
        best=best,
        tokens={name: int(adapter.get("tokens") or 0) for name, adapter in latest.items()},
        task_tokens=last["task_tokens"],
        quarantined=last.get("quarantined", {}),
    )
