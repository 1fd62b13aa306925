"""EmbeddingSplit: the tokens of pairs and triplets, one document for each text."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.data.token_split import TokenSplit

ANCHOR, POSITIVE, NEGATIVE = range(3)
"""Documents of an example."""


@dataclass(frozen=True)
class EmbeddingSplit(TokenSplit):
    """A TokenSplit whose examples are an anchor, a positive and perhaps a negative. Each text is a row of its
    own, with its special tokens, and no token of it is learnt as the next one."""

    spec: EmbeddingSpec

    @property
    def is_packed(self) -> bool:
        return False

    @property
    def longest_row(self) -> int:
        """Tokens of the longest text."""
        return int(np.diff(self.offsets).max(initial=0))

    def size(self, index: int, document: int) -> int:
        """Tokens of a text of an example."""
        return len(self.text(index, document))

    def text(self, index: int, document: int) -> NDArray[np.int32]:
        """The tokens of a text of an example."""
        return self.document_tokens(self.pack_offsets[index] + document)

    def sequence(
        self, index: int, document: int = 0, completion_of: int | None = None
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The one document of a row."""
        number = self.pack_offsets[index] + document
        return [(self.document_tokens(number), self.learnt_spans(number))]


def embedding_split(split: TokenSplit, spec: EmbeddingSpec) -> EmbeddingSplit:
    """The pairs, or triplets, that encoded documents make up: one for every two, or three."""
    pack_offsets = np.arange(0, len(split.offsets), spec.texts, dtype=np.int64)
    content = {field.name: getattr(split, field.name) for field in fields(TokenSplit)}
    content |= {
        "pack_offsets": pack_offsets,
        "counts": replace(split.counts, examples=len(pack_offsets) - 1),
    }
    return EmbeddingSplit(**content, spec=spec)
