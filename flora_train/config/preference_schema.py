"""Keys of a task that choose its objective: supervised learning, or preferences between completions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.base import ConfigModel, Text
from flora_train.config.errors import choices

Objective = Literal["sft", "dpo", "ipo", "orpo", "kto"]

PAIRED = ("dpo", "ipo", "orpo")
"""Objectives that learn from a chosen and a rejected completion."""
REFERRED = ("dpo", "ipo", "kto")
"""Objectives that compare an adapter with a reference."""
OWNERS: dict[str, tuple[str, ...]] = {
    "chosen": ("sft", *PAIRED),
    "rejected": ("sft", *PAIRED),
    "label": ("kto",),
    "beta": (*PAIRED, "kto"),
    "label_smoothing": ("dpo",),
    "sft_weight": PAIRED,
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": REFERRED,
}
"""Key -> the objectives that have it."""

BETA = 0.1
"""Default of beta."""


class PreferenceKeys(ConfigModel):
    """The objective of a task, and the keys that belong to it."""

    objective: Objective | None = None
    """What the adapters of this task learn. sft: the next token of completions; of pairs, the chosen
    completion. dpo (Rafailov et al. 2023), ipo (Azar et al. 2023) and orpo (Hong et al. 2024): to prefer the
    chosen to the rejected completion of a pair. kto (Ethayarajh et al. 2024): from single completions that
    are labelled good or bad. Default: sft, of rows that are not pairs."""
    chosen: Text | None = Field(None, validate_default=True)
    """Column, or template with {columns}, of the preferred completion; or a column of messages. Default:
    chosen."""
    rejected: Text | None = Field(None, validate_default=True)
    """The same of the other completion. Default: rejected."""
    label: Text | None = None
    """Column of the labels of texts: each adapter of the task learns a head that predicts them, or the words
    of a verbalizer. With objective: kto, the column that is true for a good completion and false for a bad
    one, by default label. Default: the rows have no labels."""
    beta: float | None = Field(None, gt=0, le=1e6)
    """dpo, ipo, kto: how closely an adapter stays to its reference; larger is closer. orpo: weight of the
    odds ratio. Default: 0.1."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """dpo only: the probability that the labels of a pair are the wrong way round (conservative DPO).
    Default: 0."""
    sft_weight: float | None = Field(None, ge=0, le=1e6)
    """dpo, ipo, orpo: weight of the next-token loss of the chosen completion, which is added to the loss.
    Default: 0; for orpo 1, as in the paper."""
    desirable_weight: float | None = Field(None, gt=0, le=1e6)
    """kto only: weight of the rows with a true label. Default: 1."""
    undesirable_weight: float | None = Field(None, gt=0, le=1e6)
    """kto only: weight of the rows with a false label. Default: 1."""
    reference: Literal["batch", "cached"] | None = None
    """dpo, ipo, kto: how the log-probabilities of the reference, the base model, are computed. batch: in
    every micro-batch, without gradient. cached: once before training, and kept on disk. The reference of an
    adapter with init_from is its initial state, which is always cached. Default: batch."""

    @field_validator(*OWNERS)
    @classmethod
    def _belongs_to_the_objective(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or "objective" not in info.data:
            return value
        objective, owners = info.data["objective"], OWNERS[str(info.field_name)]
        if objective is None and info.field_name == "label":  # of a task of labelled texts
            return value
        if objective is None:
            raise ValueError(f"requires objective: set it to {choices(owners)}, or remove this key")
        if objective not in owners:
            raise ValueError(f"has no meaning for objective {objective}; it belongs to {choices(owners)}")
        return value

    @field_validator("rejected")
    @classmethod
    def _chosen_and_rejected(cls, rejected: str | None, info: ValidationInfo) -> str | None:
        if "chosen" in info.data and rejected is not None and rejected == info.data["chosen"]:
            raise ValueError("is the same as chosen: name the column of the other completion")
        return rejected

    @property
    def prefers(self) -> bool:
        """Whether the task learns a preference."""
        return self.objective not in (None, "sft")

    @property
    def beta_value(self) -> float:
        return BETA if self.beta is None else self.beta

    @property
    def sft_value(self) -> float:
        """Weight of the next-token loss of the chosen completion."""
        if self.sft_weight is None:
            return 1.0 if self.objective == "orpo" else 0.0
        return self.sft_weight
