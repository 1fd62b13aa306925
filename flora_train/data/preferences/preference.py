"""Preference: the objective of a task and its settings, with the defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass

from flora_train.config.preference_schema import PAIRED, REFERRED, Objective, PreferenceKeys

BATCH, CACHED = "batch", "cached"


@dataclass(frozen=True)
class Preference:
    """What the adapters of a preference task learn."""

    objective: Objective
    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: str = BATCH
    """How the log-probabilities of the base are computed: in every micro-batch, or once (cached)."""

    @property
    def is_paired(self) -> bool:
        """Whether its loss is one of pairs."""
        return self.objective in PAIRED

    @property
    def has_reference(self) -> bool:
        return self.objective in REFERRED

    def reads_cache(self, has_initial_state: bool) -> bool:
        """Whether an adapter's reference is computed before training: its initial state (init_from), or a
        cached base."""
        return self.has_reference and (self.reference == CACHED or has_initial_state)

    @property
    def is_supervised(self) -> bool:
        """Whether the chosen completion is learnt like any text."""
        return self.objective == "sft"


def preference_of(task: PreferenceKeys) -> Preference | None:
    """The preference of a task; None if it gives no objective."""
    if task.objective is None:
        return None
    return Preference(
        objective=task.objective,
        beta=task.beta_value,
        label_smoothing=task.label_smoothing or 0.0,
        sft_weight=task.sft_value,
        desirable_weight=task.desirable_weight or 1.0,
        undesirable_weight=task.undesirable_weight or 1.0,
        reference=task.reference or BATCH,
    )
