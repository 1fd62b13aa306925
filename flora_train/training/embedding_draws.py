"""The losses of the draws of embeddings in a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flora_train.data.batch import Row
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.task import Task
from flora_train.training.embedding_loss import DrawEmbeddings, DrawTexts, contrastive_losses
from flora_train.training.pooling import Embeddings


def draw_losses(
    task: Task, rows: Sequence[Row], embeddings: Embeddings | None, units: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """The losses of the pairs or triplets of one task, float64 [n], and the adapters that learn from them,
    int64 [n].

    rows: of the micro-batch; units: positions of the rows of each draw, for each adapter. Only texts of the
    same unit are compared.
    """
    assert task.embedding is not None
    assert embeddings is not None
    place_of = {position: place for place, position in enumerate(embeddings.positions)}
    losses: list[Tensor] = []
    adapters: list[int] = []
    for unit in units:
        parts: list[list[int]] = [[] for _ in range(task.embedding.texts)]
        for i in unit:
            parts[rows[i].document].append(i)
        values = [embeddings.values[[place_of[i] for i in part]] for part in parts]
        texts = [[_text_key(task, rows[i]) for i in part] for part in parts]
        of_unit = contrastive_losses(
            DrawEmbeddings(*values),
            DrawTexts(*texts),
            temperature=task.embedding.temperature,
            symmetric=task.embedding.symmetric,
        )
        losses.append(of_unit)
        adapters += [rows[unit[0]].adapter] * len(of_unit)
    return torch.cat(losses), torch.tensor(adapters, device=embeddings.values.device)


def _text_key(task: Task, row: Row) -> bytes:
    """What identifies the text of a row: its tokens."""
    split = task.train
    assert isinstance(split, EmbeddingSplit)
    return split.text(row.example, row.document).tobytes()
