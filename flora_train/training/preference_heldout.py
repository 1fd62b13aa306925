"""Held-out log-probabilities and losses of a preference task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Objective = Literal["dpo", "ipo", "orpo", "kto"]


@dataclass(frozen=True)
class HeldOutPreferences:
    """Log-probabilities of the completions of n held-out pairs, or labelled rows (KTO), of one task.

    The mappings lead from a contender's id (-1: base) to an array [n].
    """

    objective: Objective
    beta: float
    chosen: Mapping[int, NDArray[np.float64]]
    """Summed log-probability of the chosen completion. KTO: of the row's completion."""
    rejected: Mapping[int, NDArray[np.float64]]
    """Summed log-probability of the rejected completion. KTO: empty."""
    reference_chosen: Mapping[int, NDArray[np.float64]]
    """The same under the reference. ORPO: empty, as it has none."""
    reference_rejected: Mapping[int, NDArray[np.float64]]
    losses: Mapping[int, NDArray[np.float64]]
    """The objective's loss of each pair or row."""
    chosen_tokens: NDArray[np.int64]
    """Tokens of completions."""
    rejected_tokens: NDArray[np.int64]
    labels: NDArray[np.bool_] | None = None
    """KTO: whether the row's completion is desirable."""
