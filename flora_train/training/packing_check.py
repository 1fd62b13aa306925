"""Does a model keep pieces apart that are packed into one sequence? Asked of the model itself, before training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flora_train.config.errors import user_error
from flora_train.data.batch import Row, collate
from flora_train.data.tokenization import SplitCounts, TokenSplit
from flora_train.models.loading import set_mode
from flora_train.training.loss import RowLosses

LENGTH = 6
"""Tokens of a probed piece."""


@torch.no_grad()
def check_packing(row_losses: RowLosses, task: str) -> None:
    """The loss of a piece must not change, to the last bit, with what stands before it in its sequence, and must be the loss
    that it has alone, up to rounding. Raises UserError for a model that ignores position_ids when it makes its mask (linear
    attention, ALiBi, convolutions), naming tasks.<task>.packing."""
    model = row_losses.model
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = np.random.default_rng(0).integers(0, vocabulary, (3, LENGTH)).astype(np.int32)
    before, other, piece = ids
    training = model.training
    model.eval()
    try:
        after_one, after_other, alone = (
            _last_loss(row_losses, pieces) for pieces in ([before, piece], [other, piece], [piece])
        )
    except TypeError as error:
        raise user_error(
            f"tasks.{task}.packing", True, f"this model takes no position_ids ({error}): set it to false"
        ) from error
    finally:
        set_mode(model, training)
    if after_one != after_other or abs(after_one - alone) > 0.02 * abs(alone):
        hint = "this model lets packed pieces see each other (its mask does not come from position_ids): set it to false"
        raise user_error(f"tasks.{task}.packing", True, hint)


def _last_loss(row_losses: RowLosses, pieces: list[np.ndarray]) -> float:
    """The loss of the last piece when these stand in one sequence."""
    lengths = [len(piece) for piece in pieces]
    split = TokenSplit(
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=np.array([*lengths[:-1], 0], dtype=np.int32),  # only the last is learnt
        label_bytes=np.zeros(len(pieces), dtype=np.int64),
        pack_offsets=np.array([0, len(pieces)]),
        counts=SplitCounts(),
    )
    # a second row, cut elsewhere: some attentions tell pieces apart only where a batch has one row
    beside = replace(
        split,
        offsets=np.array([0, 2, sum(lengths)]),
        pack_offsets=np.array([0, 2]),
        prompt_lengths=np.array([2, 0]),
    )
    rows = [Row(-1, name, 0, sum(lengths)) for name in ("asked", "beside")]
    batch = collate(rows, {"asked": split, "beside": beside}.__getitem__, 0)
    return float(row_losses(batch.to(next(row_losses.model.parameters()).device))[0])
