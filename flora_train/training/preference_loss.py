"""The losses of preferences from log-probabilities of completions: DPO, IPO, ORPO and KTO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.data.preferences.preference import Preference


@dataclass(frozen=True)
class PairScores:
    """Losses and rewards of pairs, [n] each."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class LabelledScores:
    """Losses and rewards of labelled completions, [n] each."""

    losses: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class Completions:
    """Log-probabilities of completions, summed over their tokens, of an adapter and of its reference."""

    logps: Tensor
    """[n]"""
    reference: Tensor | None
    """[n]; None for objectives without a reference."""
    tokens: Tensor
    """[n]: tokens of each completion."""

    @property
    def ratios(self) -> Tensor:
        """log p / p_ref of each completion."""
        assert self.reference is not None
        return self.logps - self.reference

    @property
    def means(self) -> Tensor:
        """The mean log-probability of a token."""
        return self.logps / self.tokens


def pair_losses(preference: Preference, chosen: Completions, rejected: Completions) -> PairScores:
    """The losses of pairs, without the next-token loss of the chosen completions."""
    beta = preference.beta
    if preference.objective == "orpo":
        losses = -beta * F.logsigmoid(_log_odds(chosen.means) - _log_odds(rejected.means))
        return PairScores(losses, beta * chosen.means, beta * rejected.means)
    if preference.objective == "sft":
        losses = -chosen.logps / chosen.tokens
        return PairScores(losses, chosen.means, rejected.means)
    rewards = beta * chosen.ratios, beta * rejected.ratios
    if preference.objective == "ipo":
        difference = chosen.ratios / chosen.tokens - rejected.ratios / rejected.tokens
        return PairScores((difference - 1 / (2 * beta)) ** 2, *rewards)
    margins, smoothing = rewards[0] - rewards[1], preference.label_smoothing
    losses = -F.logsigmoid(margins)
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * F.logsigmoid(-margins)
    return PairScores(losses, *rewards)


def labelled_losses(
    preference: Preference, completions: Completions, labels: Tensor, kl: Tensor
) -> LabelledScores:
    """The losses of KTO. labels: bool [n]; kl: the estimate z0 of the KL divergence, at least 0,
    broadcastable to [n] and without gradient."""
    ratios, beta = completions.ratios, preference.beta
    sign = torch.where(labels, 1.0, -1.0).to(ratios.dtype)
    weights = torch.where(labels, preference.desirable_weight, preference.undesirable_weight)
    losses = weights.to(ratios.dtype) * (1 - torch.sigmoid(sign * beta * (ratios - kl)))
    return LabelledScores(losses, beta * ratios)


def kl_estimate(ratios: Tensor) -> Tensor:
    """z0 of KTO from log p / p_ref of completions that follow other prompts, [..., n] -> [..., 1]."""
    return ratios.detach().mean(dim=-1, keepdim=True).clamp(min=0)


def _log_odds(logps: Tensor) -> Tensor:
    """log p / (1 - p) from log p < 0."""
    return logps - torch.log(-torch.expm1(logps))
