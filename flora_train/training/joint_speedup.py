"""What would the same work cost as separate runs? One step's batches, timed together and adapter by adapter. Nothing of the run changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flora_train.data.batch import Row, group_by_length
from flora_train.runtime.distributed import world
from flora_train.runtime.progress import ProgressBar
from flora_train.training.fsdp import is_sharded
from flora_train.training.trainer import Trainer


@dataclass(frozen=True)
class JointSpeedup:
    """Seconds of forward and backward of one step's rows: in its micro-batches (the less of before and after the other), and adapter after
    adapter, each in as few micro-batches as hold its rows."""

    together: float
    apart: float
    adapters: int


def time_joint_vs_separate(trainer: Trainer) -> dict[str, Any] | None:
    """With the rows of the last step. None where that is not possible: several processes, a divided base, adapters on the host, one adapter."""
    plan = trainer.plan(trainer.at.done - 1) if trainer.at.done else None
    if (
        plan is None
        or len(plan.label_tokens) < 2
        or world()[1] > 1
        or is_sharded(trainer.model)
        or trainer.bank.pager is not None
    ):
        return None
    room = trainer.config.training.tokens_per_microbatch
    of: dict[int, list[Row]] = {}
    for row in (row for rows in plan.microbatches for row in rows):
        of.setdefault(row.adapter, []).append(row)
    alone = [group_by_length(rows, room) for rows in of.values()]
    with ProgressBar("time adapters apart", len(alone) + 2) as watch:
        watch.update(0)
        together = _seconds(trainer, plan.microbatches)
        watch.update(1)
        apart = 0.0
        for done, batches in enumerate(alone, start=2):
            apart += _seconds(trainer, batches)
            watch.update(done)
        together = min(
            together, _seconds(trainer, plan.microbatches)
        )  # what a first time costs, or a neighbour, is no gain of the others
        watch.update(len(alone) + 2)
    return asdict(JointSpeedup(together, apart, len(alone)))


def _seconds(trainer: Trainer, batches: Sequence[Sequence[Row]]) -> float:
    """The gradients are thrown away."""
    bank, started = trainer.bank, trainer.clock.now()
    try:
        for rows in batches:
            batch = trainer.collate(rows, trainer.training_split, trainer.pad_token).to(bank.device)
            bank.route(batch.adapter_ids, [trainer.noise(trainer.at.done, row) for row in rows])
            trainer.row_losses(batch).sum().backward()
        return trainer.clock.now() - started
    finally:
        for pool in bank.pools:
            pool.gradients.zero_()
        bank.abandon()
