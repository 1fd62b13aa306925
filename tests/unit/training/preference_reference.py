"""Losses of DPO, IPO, ORPO and KTO and their derivatives in float64, written from the papers.

Independent of flora_train: NumPy alone, derivatives by hand. What TRL 1.16 computes, as read in its source:

- A log-probability is the sum over the tokens of the completion, its end-of-sequence token included. IPO and
  ORPO divide it by the number of these tokens, DPO and KTO do not.
- DPO (`sigmoid`) ignores `label_smoothing`. TRL's smoothed form is `robust` (Chowdhury et al. 2024), which
  divides by 1 - 2 * smoothing; the conservative form (Mitchell 2023) does not.
- The SFT term of ORPO is the cross entropy of prompt and chosen completion, all tokens but the first, a mean
  over these tokens of the whole batch. The SFT term of DPO covers the tokens of chosen completions alone.
- KTO's KL term is one constant per batch: max(0, mean of log-ratios of mismatched rows), where row i has its
  own prompt and the completion of row i - 1. The weights of rows do not enter the denominator of the mean.
- The reference of a new adapter is the model with adapters disabled; that of a loaded one is its first state.
- The loss of a batch is the mean over pairs (KTO: rows). Dropout is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class PairLosses:
    """Losses of pairs, and their derivatives. All [n]."""

    losses: Vector
    d_chosen: Vector
    """Derivative of a pair's loss by the summed log-probability of its chosen completion."""
    d_rejected: Vector


@dataclass(frozen=True)
class RowLosses:
    """Losses of labelled completions, and their derivatives by the summed log-probability. All [n]."""

    losses: Vector
    d_logp: Vector


def sigmoid(x: Vector) -> Vector:
    return np.exp(-np.logaddexp(0.0, -x))


def log_sigmoid(x: Vector) -> Vector:
    return -np.logaddexp(0.0, -x)


def log_one_minus_exp(x: Vector) -> Vector:
    """log(1 - exp(x)) for x < 0."""
    return np.where(x < -np.log(2), np.log1p(-np.exp(x)), np.log(-np.expm1(np.minimum(x, -1e-300))))


def dpo(
    chosen: Vector,
    rejected: Vector,
    reference_chosen: Vector,
    reference_rejected: Vector,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> PairLosses:
    """Rafailov et al. 2023, equation 7; with smoothing the conservative or the robust form."""
    z = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    first, second, scale = 1 - label_smoothing, label_smoothing, 1.0
    if robust:
        second, scale = -label_smoothing, 1 / (1 - 2 * label_smoothing)
    losses = scale * (-first * log_sigmoid(z) - second * log_sigmoid(-z))
    d_z = scale * (-first * sigmoid(-z) + second * sigmoid(z))
    return PairLosses(losses, beta * d_z, -beta * d_z)


def ipo(
    chosen: Vector,
    rejected: Vector,
    reference_chosen: Vector,
    reference_rejected: Vector,
    *,
    chosen_tokens: Vector,
    rejected_tokens: Vector,
    beta: float,
) -> PairLosses:
    """Azar et al. 2023, equation 17, with log-ratios per token."""
    h = (chosen - reference_chosen) / chosen_tokens - (rejected - reference_rejected) / rejected_tokens
    distance = h - 1 / (2 * beta)
    return PairLosses(distance**2, 2 * distance / chosen_tokens, -2 * distance / rejected_tokens)


def odds_ratio(
    chosen: Vector, rejected: Vector, *, chosen_tokens: Vector, rejected_tokens: Vector, beta: float
) -> PairLosses:
    """Hong et al. 2024, equation 7 times beta: ORPO without its SFT term."""
    a, b = chosen / chosen_tokens, rejected / rejected_tokens
    log_odds = (a - b) - (log_one_minus_exp(a) - log_one_minus_exp(b))
    # d log(odds) / d log(p) = 1 / (1 - p)
    slope = -beta * sigmoid(-log_odds)
    d_chosen = slope / -np.expm1(a) / chosen_tokens
    d_rejected = -slope / -np.expm1(b) / rejected_tokens
    return PairLosses(-beta * log_sigmoid(log_odds), d_chosen, d_rejected)


def sft(logps: Vector, tokens: Vector) -> tuple[float, float]:
    """Mean cross entropy per token of a batch, and its derivative by each summed log-probability."""
    total = float(tokens.sum())
    return -float(logps.sum()) / total, -1 / total


def orpo_loss(
    chosen: Vector,
    rejected: Vector,
    *,
    chosen_tokens: Vector,
    rejected_tokens: Vector,
    whole_chosen: Vector,
    whole_tokens: Vector,
    beta: float,
    sft_weight: float = 1.0,
) -> float:
    """The loss of a batch: the SFT term over prompts and chosen completions, and the mean odds-ratio term."""
    pairs = odds_ratio(
        chosen, rejected, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens, beta=beta
    )
    return sft_weight * sft(whole_chosen, whole_tokens)[0] + float(pairs.losses.mean())


def kl_of_draw(mismatched: Vector, reference_mismatched: Vector) -> float:
    """The constant that KTO compares each log-ratio with."""
    return max(0.0, float((mismatched - reference_mismatched).mean()))


def kto(
    logps: Vector,
    reference: Vector,
    labels: NDArray[np.bool_],
    *,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> RowLosses:
    """Ethayarajh et al. 2024, equation 8, plus the constant weight of each row."""
    sign = np.where(labels, 1.0, -1.0)
    weight = np.where(labels, desirable_weight, undesirable_weight)
    z = beta * sign * ((logps - reference) - kl)
    return RowLosses(weight * sigmoid(-z), -weight * beta * sign * sigmoid(z) * sigmoid(-z))
