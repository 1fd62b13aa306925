"""Checks that a model keeps documents separate that are packed into one sequence, by running it before
training.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flora_train.config.errors import user_error
from flora_train.data.batch import Row, collate
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after
from flora_train.models.loading import set_mode
from flora_train.training.loss import RowLosses

LENGTH = 6
"""Tokens of a document in the check."""


@torch.no_grad()
def check_packing(row_losses: RowLosses, task: str) -> None:
    """Raises UserError, naming tasks.<task>.packing, for a model that ignores position_ids in its mask:
    linear attention, ALiBi, convolutions.

    The loss of a document must not change, to the last bit, with the document before it in its sequence, and
    must equal, up to rounding, the loss of the document alone.
    """
    model = row_losses.model
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = np.random.default_rng(0).integers(0, vocabulary, (3, LENGTH)).astype(np.int32)
    first, other, document = ids
    training = model.training
    model.eval()
    try:
        after_first = _last_loss(row_losses, [first, document])
        after_other = _last_loss(row_losses, [other, document])
        alone = _last_loss(row_losses, [document])
    except TypeError as error:
        hint = f"this model takes no position_ids ({error}): set it to false"
        raise user_error(f"tasks.{task}.packing", True, hint) from error
    finally:
        set_mode(model, training)
    if after_first != after_other or abs(after_first - alone) > 0.02 * abs(alone):
        hint = (
            "this model lets packed documents see each other (its mask ignores position_ids): set it to false"
        )
        raise user_error(f"tasks.{task}.packing", True, hint)


def _last_loss(row_losses: RowLosses, documents: list[np.ndarray]) -> float:
    """The loss of the last of these documents in one sequence."""
    lengths = [len(document) for document in documents]
    split = TokenSplit(
        tokens=np.concatenate(documents),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        **spans_after(np.array([*lengths[:-1], 0]), np.array(lengths)),  # only the last has labels
        label_bytes=np.zeros(len(documents), dtype=np.int64),
        pack_offsets=np.array([0, len(documents)]),
        counts=SplitCounts(),
    )
    # a second row with other borders: some attentions separate documents only in batches of one row
    other = spans_after(np.array([2, 0]), np.array([2, sum(lengths) - 2]))
    neighbour = replace(
        split,
        offsets=np.array([0, 2, sum(lengths)]),
        pack_offsets=np.array([0, 2]),
        spans=other["spans"],
        span_offsets=other["span_offsets"],
    )
    rows = [Row(-1, name, 0, sum(lengths)) for name in ("tested", "neighbour")]
    batch = collate(rows, {"tested": split, "neighbour": neighbour}.__getitem__, 0)
    return float(row_losses(batch.to(next(row_losses.model.parameters()).device))[0])
