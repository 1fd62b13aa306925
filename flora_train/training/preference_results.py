"""Held-out losses and rewards of preferences, from log-probabilities of their completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora_train.adapters.spec import BASE_ID
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.training.objectives import RewardSums
from flora_train.training.preference_heldout import HeldOutPreferences
from flora_train.training.preference_loss import Completions, kl_estimate, labelled_losses, pair_losses
from flora_train.training.preference_rows import CHOSEN, KL, REJECTED

Values = NDArray[np.float64]


class HeldOutReferences(Protocol):
    """Log-probabilities of references on held-out examples, where they were computed before training."""

    def heldout(self, adapter: int) -> Mapping[int, Values] | None:
        """Part (see `part_of`) -> log p of every held-out example, for the reference of an adapter (-1: the
        base); None where the reference is the base, whose rows are in the evaluation."""
        ...


def needs_base(task: Task, adapters: Sequence[int], references: HeldOutReferences | None) -> bool:
    """Whether the base has to be evaluated as the reference of some of these adapters."""
    if task.preference is None or not task.preference.has_reference:
        return False
    if references is None:
        return True
    return any(references.heldout(adapter) is None for adapter in adapters)


def preference_results(
    task: Task,
    nats: Mapping[tuple[str, int, int], Values],
    contenders: Sequence[int],
    references: HeldOutReferences | None,
) -> HeldOutPreferences:
    """The results of a task. nats: (task, contender, part) -> -log p of the first held-out examples."""
    preference, split = task.preference, task.validation
    assert preference is not None
    assert isinstance(split, PreferenceSplit)
    logps: dict[int, dict[int, Values]] = {}
    for contender in contenders:
        parts = [part for part in (CHOSEN, REJECTED, KL) if (task.name, contender, part) in nats]
        logps[contender] = {part: -nats[task.name, contender, part] for part in parts}
    examples = len(logps[contenders[0]][CHOSEN])
    reference: dict[int, Mapping[int, Values]] = {}
    if preference.has_reference:
        for contender in contenders:
            stored = None if references is None else references.heldout(contender)
            if stored is None:
                reference[contender] = logps[BASE_ID]
            else:
                reference[contender] = {part: values[:examples] for part, values in stored.items()}
    tokens = {CHOSEN: split.learnt_counts(0)[:examples]}
    if split.is_paired:
        tokens[REJECTED] = split.learnt_counts(1)[:examples]
    labels = None
    if not split.is_paired:
        labels = np.array(split.labels[:examples])
    losses = {}
    for contender in contenders:
        scores = _Scores(preference, logps[contender], reference.get(contender), tokens, labels=labels)
        losses[contender] = scores.losses()
    return HeldOutPreferences(
        objective=preference.objective,  # type: ignore[arg-type]
        beta=preference.beta,
        chosen=_part(logps, CHOSEN),
        rejected=_part(logps, REJECTED),
        reference_chosen=_part(reference, CHOSEN),
        reference_rejected=_part(reference, REJECTED),
        losses=losses,
        chosen_tokens=tokens[CHOSEN],
        rejected_tokens=tokens.get(REJECTED, np.zeros(0, dtype=np.int64)),
        labels=labels,
    )


def reward_metrics(results: HeldOutPreferences, contender: int) -> dict[str, float]:
    """Reward accuracy and margin of a contender, for the log."""
    if results.objective == "orpo":
        chosen = results.beta * results.chosen[contender] / results.chosen_tokens
        rejected = results.beta * results.rejected[contender] / results.rejected_tokens
    else:
        chosen = results.beta * (results.chosen[contender] - results.reference_chosen[contender])
        rejected = np.zeros(0)
    if results.labels is not None:
        good = results.labels
        accurate = float(((chosen > 0) == good).sum())
        sums = (chosen[good].sum(), chosen[~good].sum(), good.sum(), (~good).sum())
        return RewardSums(accurate, *map(float, sums)).metrics(len(chosen))
    if results.objective != "orpo":
        rejected = results.beta * (results.rejected[contender] - results.reference_rejected[contender])
    accurate = float((chosen > rejected).sum())
    sums = (chosen.sum(), rejected.sum(), len(chosen), len(chosen))
    return RewardSums(accurate, *map(float, sums)).metrics(len(chosen))


class _Scores:
    """The losses of one contender. logps, reference, tokens: by part."""

    def __init__(
        self,
        preference: Preference,
        logps: Mapping[int, Values],
        reference: Mapping[int, Values] | None,
        tokens: Mapping[int, NDArray[np.int64]],
        *,
        labels: NDArray[np.bool_] | None,
    ) -> None:
        self.preference, self.logps, self.reference = preference, logps, reference
        self.tokens, self.labels = tokens, labels

    def losses(self) -> Values:
        """The objective's loss of every example. The next-token loss is a mean over tokens, of which each
        pair has its share, so that the mean of the losses is the objective."""
        if self.labels is not None:
            assert self.reference is not None
            kl = kl_estimate(torch.from_numpy(self.logps[KL] - self.reference[KL]))
            labels = torch.from_numpy(self.labels)
            scores = labelled_losses(self.preference, self._completions(CHOSEN), labels, kl)
            return scores.losses.numpy()
        pairs = pair_losses(self.preference, self._completions(CHOSEN), self._completions(REJECTED))
        losses: Values = pairs.losses.numpy()
        if self.preference.sft_weight:
            share = len(losses) / self.tokens[CHOSEN].sum()
            losses = losses - self.preference.sft_weight * share * self.logps[CHOSEN]
        return losses

    def _completions(self, part: int) -> Completions:
        reference: Tensor | None = None
        if self.reference is not None:
            reference = torch.from_numpy(np.array(self.reference[part]))
        tokens = torch.from_numpy(self.tokens[part].astype(np.float64))
        return Completions(torch.from_numpy(self.logps[part]), reference, tokens)


def _part(values: Mapping[int, Mapping[int, Values]], part: int) -> dict[int, Values]:
    """Contender -> one part of its values, where it has that part."""
    return {contender: parts[part] for contender, parts in values.items() if part in parts}
