"""Checks, by running an encoder, that the states of a row depend on its own tokens alone (guarantee I1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flora_train.config.errors import UserError, first_line, user_error
from flora_train.models.probe_inputs import device_of, plain_tokens, preserved_state

TESTED, SHORT, LONG = 4, 6, 9
"""Tokens of the tested row, and of its neighbours in two batches."""
CHANGE = {True: 5e-3, False: 0.15}
"""Relative change of the states that counts as rounding, in float32 and in 16 bits."""


@torch.no_grad()
def check_encoder(model: Any, pad_token: int) -> None:
    """Raises UserError if the states of a row change with its neighbours, or with the padding that they
    cause. The model does not change."""
    tested, first, second = plain_tokens(model, TESTED + SHORT + LONG, without=[pad_token]).split(
        [TESTED, SHORT, LONG]
    )
    try:
        with preserved_state(model, training=True):
            alone = _states(model, [tested], pad_token)
            others = [_states(model, [tested, other], pad_token) for other in (first, second)]
    except UserError:
        raise
    except Exception as error:
        hint = f"cannot read a few rows, as training would: {type(error).__name__}: {first_line(error)}"
        raise user_error("model", type(model).__name__, hint) from error
    exact = alone.dtype not in (torch.bfloat16, torch.float16)
    for states in others:
        change = float((states - alone).float().norm() / alone.float().norm())
        if not change <= CHANGE[exact]:
            hint = (
                f"changes a row's states by {change:.0%} with the other rows of the batch or their padding, "
                "so that adapters would not be independent"
            )
            raise user_error("model", type(model).__name__, hint)


def _states(model: Any, rows: list[Tensor], pad: int) -> Tensor:
    """The last states of the first of these rows, right-padded."""
    length = max(map(len, rows))
    ids, mask = (torch.full((len(rows), length), value, device=device_of(model)) for value in (pad, 0))
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    states: Tensor = model.base_model(input_ids=ids, attention_mask=mask)[0]
    return states[0, : len(rows[0])]
