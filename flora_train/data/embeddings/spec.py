"""EmbeddingSpec: how the embeddings of a task are made and learnt, with the defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass

from flora_train.config.embedding_schema import POOLING, TEMPERATURE, EmbeddingKeys, Pooling


@dataclass(frozen=True)
class EmbeddingSpec:
    """What the adapters of a task of embeddings learn."""

    pooling: Pooling = POOLING
    temperature: float = TEMPERATURE
    symmetric: bool = False
    has_negatives: bool = False
    """Whether every anchor has a negative of its own: rows are triplets."""
    examples_per_draw: int = 8
    """Examples of a draw. Held-out examples are compared in groups of at least as many."""

    @property
    def texts(self) -> int:
        """Texts of a row."""
        return 3 if self.has_negatives else 2

    @property
    def least_examples(self) -> int:
        """The smallest draw of which the loss can be computed."""
        return 1 if self.has_negatives and not self.symmetric else 2


def embedding_of(task: EmbeddingKeys, examples_per_draw: int) -> EmbeddingSpec | None:
    """The embeddings of a task; None if it learns none."""
    if not task.embeds:
        return None
    return EmbeddingSpec(
        pooling=task.pooling or POOLING,
        temperature=TEMPERATURE if task.temperature is None else task.temperature,
        symmetric=bool(task.symmetric),
        has_negatives=task.negative is not None,
        examples_per_draw=examples_per_draw,
    )
