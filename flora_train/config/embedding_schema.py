"""Keys of a task whose rows are pairs or triplets of texts, from which embeddings are learnt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.base import ConfigModel, Text

Pooling = Literal["mean", "cls", "last"]

EMBEDDING_KEYS = ("anchor", "positive", "negative", "pooling", "temperature", "symmetric")
EMBEDDING_OPTIONS = EMBEDDING_KEYS[2:]
"""The keys that pairs need not have."""
POOLING: Pooling = "mean"
"""Default of pooling."""
TEMPERATURE = 0.05
"""Default of temperature."""


class EmbeddingKeys(ConfigModel):
    """The keys of a task whose adapters learn embeddings of texts."""

    anchor: Text | None = Field(None, validate_default=True)
    """Column, or template with {columns}, of a text whose embedding is to be closest to that of its
    `positive`. Makes this a task of embeddings. Default: the task learns no embeddings."""
    positive: Text | None = Field(None, validate_default=True)
    """The same of the text that belongs to the anchor: an answer, a paraphrase, a passage."""
    negative: Text | None = None
    """The same of a text that looks as if it belonged to the anchor and does not. All rows have one. Default:
    rows are pairs, whose negatives are the other positives of their draw."""
    pooling: Pooling | None = None
    """How the embedding of a text is made of the last hidden states of its tokens. mean: their mean. cls: the
    first one, of encoders. last: the last one. Default: mean."""
    temperature: float | None = Field(None, ge=1e-4, le=1e4)
    """What cosine similarities are divided by in the loss. Default: 0.05."""
    symmetric: bool | None = None
    """Whether each positive has to find its anchor among the anchors of its draw, too. Default: false."""

    @field_validator("positive")
    @classmethod
    def _of_an_anchor(cls, positive: str | None, info: ValidationInfo) -> str | None:
        if "anchor" not in info.data:
            return positive
        anchor = info.data["anchor"]
        if positive is None and anchor is not None:
            raise ValueError(
                "is missing, and anchor is given: name the column of the texts that belong to it"
            )
        if positive is not None and anchor is None:
            raise ValueError("requires anchor: name the column of the other text, or remove this key")
        if positive is not None and positive == anchor:
            raise ValueError("is the same as anchor: name the column of the other text")
        return positive

    @field_validator(*EMBEDDING_OPTIONS)
    @classmethod
    def _belongs_to_embeddings(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and "anchor" in info.data and info.data["anchor"] is None:
            raise ValueError("belongs to tasks of embeddings: set anchor and positive, or remove this key")
        return value

    @field_validator("negative")
    @classmethod
    def _is_another_column(cls, negative: str | None, info: ValidationInfo) -> str | None:
        for key in ("anchor", "positive"):
            if negative is not None and negative == info.data.get(key):
                raise ValueError(f"is the same as {key}: name the column of the other text")
        return negative

    @property
    def embeds(self) -> bool:
        """Whether the task's adapters learn embeddings."""
        return self.anchor is not None
