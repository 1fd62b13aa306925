"""The loss of a micro-batch: the objectives of all its rows, each in the share of its adapter's step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import torch
from torch import Tensor

from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Row
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.training.embedding_draws import draw_losses
from flora_train.training.pooling import Embeddings
from flora_train.training.preference_loss import (
    Completions,
    PairScores,
    kl_estimate,
    labelled_losses,
    pair_losses,
)
from flora_train.training.step_plan import StepPlan

NATS, PREFERENCE, ACCURATE, CHOSEN, REJECTED, CHOSEN_COUNT, REJECTED_COUNT, ROUTER_LOSS = range(8)
"""Columns of a step's sums for each adapter: -log p of learnt tokens; losses of preferences or of pairs of
texts; pairs or rows that are ordered right; rewards of chosen (good) and rejected (bad) completions, and
their numbers; the load-balance loss of routers, or the loss of gates."""
COLUMNS = 8


@dataclass(frozen=True)
class RowNats:
    """Rows of a micro-batch, and -log p of their learnt tokens, [B]."""

    rows: Sequence[Row]
    nats: Tensor
    embeddings: Embeddings | None = None
    """Of the rows that have one."""


class References(Protocol):
    """Log-probabilities of references that were computed before training."""

    def logp(self, row: Row) -> float:
        """Of the completion of a training row, for the reference of the row's adapter."""
        ...


@dataclass(frozen=True)
class RewardSums:
    """Sums over the pairs, or labelled completions, that an adapter learnt from."""

    accurate: float = 0.0
    """Pairs, or completions, that are ordered as their labels say."""
    chosen: float = 0.0
    """Rewards of chosen, or good, completions."""
    rejected: float = 0.0
    chosen_count: float = 0.0
    rejected_count: float = 0.0

    def __add__(self, other: RewardSums) -> RewardSums:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return RewardSums(*(own + more for own, more in pairs))

    def metrics(self, count: int) -> dict[str, float]:
        """Means over `count` pairs or completions. There is no margin without completions of both kinds."""
        metrics = {"reward_accuracy": self.accurate / count}
        if self.chosen_count and self.rejected_count:
            margin = self.chosen / self.chosen_count - self.rejected / self.rejected_count
            metrics["reward_margin"] = margin
        return metrics


class StepSums:
    """Sums of a step by adapter, added up on the device, float64 [adapters, COLUMNS]."""

    def __init__(self, adapters: int, device: torch.device) -> None:
        self.sums = torch.zeros(adapters, COLUMNS, dtype=torch.float64, device=device)

    def add(self, column: int, adapters: Tensor, values: Tensor) -> None:
        """Add values [n] to the rows of these adapters, int64 [n]."""
        self.sums[:, column].index_add_(0, adapters, values.detach().double())


class StepTotals:
    """What the sums of a step, on all processes, say about each of its adapters.

    sums: of StepSums, flat; task_of: by adapter id.
    """

    def __init__(self, plan: StepPlan, sums: Sequence[float], task_of: Sequence[Task]) -> None:
        self.losses: dict[int, float] = {}
        """Adapter id -> its loss: nats per token, or the mean loss of its preferences with the weighted nats
        per token of the chosen completions."""
        self.counts: dict[int, float] = {}
        """Adapter id -> what its loss is a mean over: label tokens, pairs, labelled completions, weights of
        labelled texts, or texts with their positives."""
        self.loss_sums: dict[int, float] = {}
        """Adapter id -> loss times count."""
        self.rewards: dict[int, RewardSums] = {}
        """Adapter id -> rewards, for adapters that learn preferences."""
        self.router_losses: dict[int, float] = {}
        """Adapter id -> the load-balance loss of its routers, or the loss of its gates, which is no part of
        its loss."""
        for adapter, tokens in plan.label_tokens.items():
            columns = sums[adapter * COLUMNS : (adapter + 1) * COLUMNS]
            if adapter in plan.draws or columns[ROUTER_LOSS]:
                self.router_losses[adapter] = columns[ROUTER_LOSS]
            if adapter in plan.texts:
                self.counts[adapter], self.loss_sums[adapter] = plan.texts[adapter], columns[PREFERENCE]
                self.losses[adapter] = columns[PREFERENCE] / plan.texts[adapter]
                continue
            preferences = plan.preferences.get(adapter)
            if preferences is None:
                self.counts[adapter] = tokens
                self.losses[adapter] = columns[NATS] / tokens if tokens else 0.0
                self.loss_sums[adapter] = columns[NATS]
                continue
            self.counts[adapter] = preferences
            self.losses[adapter] = columns[PREFERENCE] / preferences
            preference = task_of[adapter].preference
            if preference is not None and preference.sft_weight:
                nats = columns[NATS] / plan.chosen_tokens[adapter]
                self.losses[adapter] += preference.sft_weight * nats
            self.loss_sums[adapter] = self.losses[adapter] * preferences
            self.rewards[adapter] = RewardSums(*columns[ACCURATE:ROUTER_LOSS])


class MicrobatchLoss:
    """Combines the losses of rows into the loss of a micro-batch."""

    def __init__(self, tasks: Mapping[str, Task], references: References) -> None:
        self.tasks, self.references = tasks, references

    def __call__(
        self,
        learnt: RowNats,
        frozen: RowNats | None,
        *,
        plan: StepPlan,
        sums: StepSums,
    ) -> Tensor:
        """The loss, of which each adapter's part is its share of the mean over its own tokens, pairs or
        labelled completions of the whole step.

        learnt, frozen: the rows of the micro-batch with and without gradients. Adds to `sums`.
        """
        rows, nats = learnt.rows, learnt.nats
        weights = torch.tensor([self._token_weight(row, plan) for row in rows], device=nats.device)
        loss = (nats * weights).sum()
        counted = [i for i, row in enumerate(rows) if row.document == 0]
        ids = torch.tensor([rows[i].adapter for i in counted], device=nats.device)
        sums.add(NATS, ids, nats[counted])
        if len(counted) == len(rows) and all(row.unit is None for row in rows):
            return loss
        scores = _Scores(self, learnt, frozen)
        for task, units in _units_by_task(rows).items():
            if self.tasks[task].embedding is not None:
                losses, adapters = draw_losses(self.tasks[task], rows, learnt.embeddings, units)
                sums.add(PREFERENCE, adapters, losses)
                shares = [1.0 / plan.texts[adapter] for adapter in adapters.tolist()]
                loss = loss + (losses * torch.tensor(shares, device=losses.device).to(losses.dtype)).sum()
                continue
            preference = self.tasks[task].preference
            assert preference is not None
            if preference.objective == "kto":
                loss = loss + scores.labelled(preference, units, plan=plan, sums=sums)
            else:
                loss = loss + scores.pairs(preference, units, plan=plan, sums=sums)
        return loss

    def split(self, task: str) -> PreferenceSplit:
        split = self.tasks[task].train
        assert isinstance(split, PreferenceSplit)
        return split

    def _token_weight(self, row: Row, plan: StepPlan) -> float:
        """The weight of -log p of a row as such."""
        if row.unit is None:
            count = plan.label_tokens[row.adapter]
            return 1.0 / count if count else 0.0
        preference = self.tasks[row.task].preference
        if preference is None or row.document or not preference.sft_weight:
            return 0.0
        return preference.sft_weight / plan.chosen_tokens[row.adapter]


class _Scores:
    """The losses of the preferences in a micro-batch."""

    def __init__(self, owner: MicrobatchLoss, learnt: RowNats, frozen: RowNats | None) -> None:
        self.owner, self.rows, self.logps = owner, learnt.rows, -learnt.nats.double()
        self.frozen_rows: Sequence[Row] = ()
        self.frozen_logps = self.logps[:0]
        if frozen is not None:
            self.frozen_rows, self.frozen_logps = frozen.rows, -frozen.nats.double()
        self._places = {row: place for place, row in enumerate(self.frozen_rows)}
        self._of_unit: dict[tuple[str, int | None, int], list[int]] = defaultdict(list)
        for place, row in enumerate(self.frozen_rows):
            self._of_unit[row.task, row.unit, row.adapter].append(place)

    def pairs(
        self, preference: Preference, units: Sequence[Sequence[int]], *, plan: StepPlan, sums: StepSums
    ) -> Tensor:
        """The sum over pairs of one task. units: positions of their two rows."""
        chosen = [next(i for i in unit if self.rows[i].document == 0) for unit in units]
        rejected = [next(i for i in unit if self.rows[i].document == 1) for unit in units]
        scores: PairScores = pair_losses(
            preference, self._completions(preference, chosen), self._completions(preference, rejected)
        )
        adapters = self._adapters(chosen)
        sums.add(PREFERENCE, adapters, scores.losses)
        sums.add(ACCURATE, adapters, scores.chosen_rewards > scores.rejected_rewards)
        ones = torch.ones_like(scores.losses)
        for column, values in (
            (CHOSEN, scores.chosen_rewards),
            (REJECTED, scores.rejected_rewards),
            (CHOSEN_COUNT, ones),
            (REJECTED_COUNT, ones),
        ):
            sums.add(column, adapters, values)
        return (scores.losses * self._shares(chosen, plan)).sum()

    def labelled(
        self, preference: Preference, units: Sequence[Sequence[int]], *, plan: StepPlan, sums: StepSums
    ) -> Tensor:
        """The sum over labelled completions of one task. units: positions of the rows of each draw."""
        places = [i for unit in units for i in unit]
        task = self.rows[places[0]].task
        given = self.owner.split(task).labels
        labels = torch.tensor([bool(given[self.rows[i].example]) for i in places], device=self.logps.device)
        estimates = [self._kl(unit) for unit in units]
        sizes = torch.tensor([len(unit) for unit in units], device=self.logps.device)
        kl = torch.cat(estimates).repeat_interleave(sizes)
        scores = labelled_losses(preference, self._completions(preference, places), labels, kl)
        adapters = self._adapters(places)
        sums.add(PREFERENCE, adapters, scores.losses)
        sums.add(ACCURATE, adapters, (scores.rewards > 0) == labels)
        for column, count, members in (
            (CHOSEN, CHOSEN_COUNT, labels),
            (REJECTED, REJECTED_COUNT, ~labels),
        ):
            sums.add(column, adapters[members], scores.rewards[members])
            sums.add(count, adapters[members], members[members])
        return (scores.losses * self._shares(places, plan)).sum()

    def _kl(self, unit: Sequence[int]) -> Tensor:
        """z0 of a draw, [1]."""
        first = self.rows[unit[0]]
        places = self._of_unit[first.task, first.unit, first.adapter]
        reference = self._reference([self.frozen_rows[place] for place in places])
        return kl_estimate(self.frozen_logps[places] - reference)

    def _completions(self, preference: Preference, places: Sequence[int]) -> Completions:
        rows = [self.rows[i] for i in places]
        split = self.owner.split(rows[0].task)
        tokens = [split.learnt(row.example, row.document) for row in rows]
        reference = None
        if preference.has_reference:
            reference = self._reference(rows)
        logps = self.logps[list(places)]
        return Completions(logps, reference, torch.tensor(tokens, device=logps.device).to(logps.dtype))

    def _reference(self, rows: Sequence[Row]) -> Tensor:
        """Log-probabilities of the reference of rows of adapters: those in the micro-batch, or else those
        that were computed before training."""
        device = self.logps.device
        places = [self._places.get(as_reference(row)) for row in rows]
        stored = [place is None for place in places]
        logps = self.frozen_logps.new_zeros(len(rows))
        if not all(stored):
            logps = self.frozen_logps[[place or 0 for place in places]]
        if not any(stored):
            return logps
        values = [0.0] * len(rows)
        for i, row in enumerate(rows):
            if stored[i]:
                values[i] = self.owner.references.logp(row)
        from_store = torch.tensor(values, dtype=logps.dtype, device=device)
        return torch.where(torch.tensor(stored, device=device), from_store, logps)

    def _adapters(self, places: Sequence[int]) -> Tensor:
        return torch.tensor([self.rows[i].adapter for i in places], device=self.logps.device)

    def _shares(self, places: Sequence[int], plan: StepPlan) -> Tensor:
        shares = [1.0 / plan.preferences[self.rows[i].adapter] for i in places]
        return torch.tensor(shares, dtype=self.logps.dtype, device=self.logps.device)


def as_reference(row: Row) -> Row:
    """The row of the base that a row is compared with."""
    return Row(
        BASE_ID,
        row.task,
        row.example,
        row.length,
        document=row.document,
        unit=row.unit,
        frozen=True,
        completion_of=row.completion_of,
    )


def _units_by_task(rows: Sequence[Row]) -> dict[str, list[list[int]]]:
    """Task -> positions of the rows of each of its units, for each adapter."""
    units: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row.unit is not None:
            units[row.task, row.unit, row.adapter].append(i)
    by_task: dict[str, list[list[int]]] = defaultdict(list)
    for (task, _, _), places in units.items():
        by_task[task].append(places)
    return by_task
