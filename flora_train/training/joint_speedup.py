"""The cost of one step's rows as one joint run and as separate runs, one for each adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Row, group_by_length, padded_tokens
from flora_train.runtime.distributed import world
from flora_train.runtime.progress import ProgressBar
from flora_train.training.fsdp import is_sharded
from flora_train.training.pooling import sum_of
from flora_train.training.step_plan import StepPlan
from flora_train.training.trainer import Trainer

logger = logging.getLogger(__name__)

DEFAULT_SECONDS = 60.0
"""Default of training.compare_separate_seconds."""

LEAST_MEASURED = 2
"""The cost is not estimated from fewer adapters."""

NOT_TIMED = (
    "the cost of separate runs is not reported: training.compare_separate_seconds is too short to measure it"
)

Batches = Sequence[Sequence[Row]]


@dataclass(frozen=True)
class JointSpeedup:
    """Seconds of the forward and backward passes over the rows of one step."""

    joint_seconds: float
    """In the step's own micro-batches: the faster of two passes, one before and one after the others."""
    separate_seconds: float
    """Adapter after adapter, each in as few micro-batches as hold its rows."""
    adapters: int
    """Adapters in the step."""
    measured: int
    """Adapters that were timed. Where these are not all, `separate_seconds` is scaled up by the tokens of the
    others.
    """


def time_joint_vs_separate(trainer: Trainer) -> JointSpeedup | None:
    """Time the rows of the last step, within training.compare_separate_seconds. Nothing of the run changes.

    None where it is not asked for (training.compare_separate), where the time does not suffice, and where it
    is not possible: several processes, a sharded base, adapters on the host, one adapter.
    """
    config = trainer.config.training
    if not config.compare_separate or not _is_comparable(trainer):
        return None
    plan = trainer.plan(trainer.state.step - 1) if trainer.state.step else None
    if plan is None or len(plan.label_tokens) < LEAST_MEASURED:
        return None
    separate = _separate_batches(trainer, plan.microbatches)
    limit = config.compare_separate_seconds or DEFAULT_SECONDS
    deadline = time.monotonic() + limit
    if 2 * trainer.state.seconds / trainer.state.step > limit:
        logger.warning(NOT_TIMED)
        return None
    with ProgressBar("time separate runs", len(separate) + 2) as progress:
        progress.update(0)
        joint = _seconds(trainer, plan.microbatches, plan)
        progress.update(1)
        rate = joint / _padded_tokens(plan.microbatches)
        seconds, tokens = _time_separately(
            trainer, separate, deadline - joint, rate=rate, progress=progress, plan=plan
        )
        if len(seconds) < LEAST_MEASURED:
            logger.warning(NOT_TIMED)
            return None
        joint = min(joint, _seconds(trainer, plan.microbatches, plan))
        progress.update(len(separate) + 2)
    estimate = sum(seconds) * sum(map(_padded_tokens, separate)) / tokens
    return JointSpeedup(joint, estimate, len(separate), len(seconds))


def _is_comparable(trainer: Trainer) -> bool:
    return world()[1] == 1 and not is_sharded(trainer.model) and trainer.bank.pager is None


def _separate_batches(trainer: Trainer, microbatches: Batches) -> list[list[list[Row]]]:
    """Each adapter's rows in micro-batches of their own. Methods alternate, so that the first few represent
    all.
    """
    rows_of: dict[int, list[Row]] = {}
    references: dict[tuple[str, int | None], dict[Row, None]] = {}
    for row in chain.from_iterable(microbatches):
        if row.adapter == BASE_ID:
            references.setdefault((row.task, row.unit), {})[row] = None
        else:
            rows_of.setdefault(row.adapter, []).append(row)
    for rows in rows_of.values():
        units = dict.fromkeys((row.task, row.unit) for row in rows if row.unit is not None)
        for unit in units:
            rows += references.get(unit, ())
    families: dict[str, list[int]] = {}
    for adapter in sorted(rows_of):
        families.setdefault(trainer.bank.specs[adapter].family, []).append(adapter)
    rank = {adapter: index for members in families.values() for index, adapter in enumerate(members)}
    room = trainer.config.training.tokens_per_microbatch
    return [
        group_by_length(rows_of[adapter], room) for adapter in sorted(rows_of, key=lambda a: (rank[a], a))
    ]


def _time_separately(
    trainer: Trainer,
    separate: Sequence[Batches],
    deadline: float,
    *,
    rate: float,
    progress: ProgressBar,
    plan: StepPlan,
) -> tuple[list[float], int]:
    """Seconds of every adapter that is expected to end before `deadline`, and their padded tokens. rate:
    seconds per token of the joint pass; plan: of the step that the rows are from.
    """
    seconds: list[float] = []
    rates: list[float] = []
    tokens = 0
    for batches in separate:
        expected = max(rates, default=2 * rate) * _padded_tokens(batches)
        if time.monotonic() + expected > deadline:
            break
        seconds.append(_seconds(trainer, batches, plan))
        rates.append(seconds[-1] / _padded_tokens(batches))
        tokens += _padded_tokens(batches)
        progress.update(1 + len(seconds))
    return seconds, tokens


def _padded_tokens(batches: Batches) -> int:
    return sum(map(padded_tokens, batches))


def _seconds(trainer: Trainer, batches: Batches, plan: StepPlan) -> float:
    """Seconds of these passes, whose gradients are discarded."""
    bank, started = trainer.bank, trainer.timer.now()
    try:
        for rows in batches:
            trainer.frozen_pass(rows)
            sum_of(trainer.learnt_pass(rows, trainer.state.step, plan)).backward()
        return trainer.timer.now() - started
    finally:
        for pool in bank.pools:
            pool.gradients.zero_()
        bank.abandon()
