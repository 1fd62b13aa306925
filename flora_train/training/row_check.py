"""Checks, by running the model, that a row's loss depends on its own past tokens alone (guarantee I1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.config.errors import UserError, first_line, user_error
from flora_train.data.batch import IGNORE, MixedBatch, Row
from flora_train.models.encoders import is_encoder
from flora_train.models.probe_inputs import (
    device_of,
    gradients_enabled,
    plain_tokens,
    preserved_state,
    probe_inputs,
)
from flora_train.models.speech_encoder import is_speech_model
from flora_train.training.encoder_check import check_encoder
from flora_train.training.loss import RowLosses

TESTED, SHORT, LONG = 4, 6, 9
"""Tokens of the tested row, and of its neighbours in two batches."""
LOSS, GRADIENT = {True: 5e-4, False: 2e-2}, {True: 5e-3, False: 0.15}
"""Relative changes that count as rounding, in float32 and in 16 bits: of a loss, and of a gradient."""
LEAK = 1e-4
"""Share of the largest gradient below which a gradient counts as zero."""


@dataclass(frozen=True)
class _Rows:
    """Tokens of the tested row, and of its neighbours in one batch and in another."""

    tested: Tensor
    neighbours: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    pad: int


def check_rows(model: Any, pad_token: int, features: Tensor | None = None) -> None:
    """Raises UserError if the loss or gradient of a row changes with its neighbours or with the padding that
    they cause, if a position sees the tokens that it is to predict, or if losses are random.

    features: [1, ...] of a clip, for a speech model. The model does not change. Collective where the base is
    sharded.
    """
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if (encoder_decoder and not is_speech_model(model.config)) or probe_inputs(model, 1, 2, features) is None:
        return
    if is_encoder(model.config):
        check_encoder(model, pad_token)
        return
    if model.get_output_embeddings() is None:
        hint = "has no output head that makes logits of its last states: it cannot be trained here"
        raise user_error("model", type(model).__name__, hint)
    try:
        with preserved_state(model, training=True):
            _check(RowLosses(model), _rows(model, pad_token), features)
    except UserError:
        raise
    except Exception as error:
        hint = (
            f"cannot compute losses of a few rows, as training would: {type(error).__name__}: "
            f"{first_line(error)}"
        )
        raise user_error("model", type(model).__name__, hint) from error


def _check(row_losses: RowLosses, rows: _Rows, features: Tensor | None) -> None:
    model = row_losses.model
    exact = next(model.parameters()).dtype not in (torch.bfloat16, torch.float16)

    def alike(losses: Sequence[float], gradients: Tensor) -> bool:
        change = max(abs(other - loss) for other in losses)
        norm = (gradients - gradient).norm()
        return change <= LOSS[exact] * abs(loss) and bool(norm <= GRADIENT[exact] * gradient.norm())

    batch = _batch(model, (rows.tested, *rows.neighbours), rows.pad, features)
    other = _batch(model, (rows.tested, *rows.others), rows.pad, features)
    torch.manual_seed(0)
    loss, gradient = _loss(row_losses, batch, rows)
    torch.manual_seed(1)
    loss_in_other, gradient_in_other = _loss(row_losses, other, rows)
    losses = [loss_in_other, *_losses_alone_and_last(row_losses, rows, features)]
    if alike(losses, gradient_in_other):
        return
    torch.manual_seed(2)
    loss_again, gradient_again = _loss(row_losses, batch, rows)
    name = type(model).__name__
    if not alike([loss_again], gradient_again):
        hint = (
            "draws random numbers in training that depend on the other rows of a batch: set its dropout "
            "and noise to 0"
        )
        raise user_error("model", name, hint)
    change = max(abs(value - loss) for value in losses)
    changed = f"loss by {change / abs(loss):.0%}" if change > LOSS[exact] * abs(loss) else "gradient"
    hint = f"changes a row's {changed} {_WITH_NEIGHBOURS}{_where(row_losses, batch, other, exact)}"
    raise user_error("model", name, hint)


@torch.no_grad()
def _losses_alone_and_last(row_losses: RowLosses, rows: _Rows, features: Tensor | None) -> list[float]:
    """The tested row's loss in a batch of its own and, for text, as the last row of a batch. Experts with a
    capacity leave the last row what the others have not used.
    """
    model = row_losses.model
    losses = [float(row_losses(_batch(model, (rows.tested,), rows.pad, features))[0])]
    if not is_speech_model(model.config):  # whose rows have different clips
        batch = _batch(model, (*rows.neighbours, *rows.others, rows.tested), rows.pad, features)
        losses.append(float(row_losses(batch)[-1]))
    return losses


_WITH_NEIGHBOURS = (
    "with the other rows of the batch (its rows mix, or it expects padding on the left), "
    "so that adapters would not be independent"
)


def _rows(model: Any, pad_token: int) -> _Rows:
    tokens = plain_tokens(model, TESTED + 2 * SHORT + LONG, without=[pad_token])
    tested, first, second, other = tokens.split([TESTED, SHORT, SHORT, LONG])
    return _Rows(tested, (first, second), (other,), pad_token)


def _batch(model: Any, rows: Sequence[Tensor], pad: int, features: Tensor | None) -> MixedBatch:
    """These rows, right-padded, with a label at every token."""
    length = max(map(len, rows))
    tokens, mask = (torch.full((len(rows), length), value, device=device_of(model)) for value in (pad, 0))
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    labels = tokens.masked_fill(mask == 0, IGNORE)
    ids = torch.full((len(rows),), -1, device=tokens.device)
    if not is_speech_model(model.config):
        return MixedBatch({"input_ids": tokens, "attention_mask": mask}, labels, ids, ())
    inputs = probe_inputs(model, len(rows), 1, features)
    assert inputs is not None
    name, clips = model.main_input_name, torch.arange(len(rows), device=tokens.device)
    made = tuple(Row(-1, "", i, length, shares_encoding=True) for i in range(len(rows)))
    next_tokens = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    return MixedBatch({name: inputs[name], "decoder_input_ids": tokens}, next_tokens, ids, made, clips)


def _loss(row_losses: RowLosses, batch: MixedBatch, rows: _Rows) -> tuple[float, Tensor]:
    """The tested row's loss, and its gradient at the embeddings of its own tokens.

    Raises UserError if it has a gradient elsewhere: at its last token, which is only predicted, at padding,
    or in other rows.
    """
    with gradients_enabled(row_losses.model) as caught:
        losses = row_losses(batch)
        losses[0].backward()
    own = []
    for ids, embeddings in caught:
        if embeddings.shape[:-1] == ids.shape and embeddings.grad is not None:
            _check_reads_its_past(row_losses.model, ids, embeddings.grad, rows)
            own += [embeddings.grad[ids == token].float().flatten() for token in rows.tested]
    return float(losses[0].detach()), torch.cat(own) if own else torch.zeros(1)


def _check_reads_its_past(model: nn.Module, ids: Tensor, gradient: Tensor, rows: _Rows) -> None:
    """gradient: of the tested row's loss at the embeddings of `ids`."""
    padding = torch.tensor([rows.pad], device=ids.device)
    groups = (rows.tested[:-1], rows.tested[-1:], torch.cat([*rows.neighbours, *rows.others]), padding)
    own, last, others, pads = (
        float((gradient * torch.isin(ids, group)[..., None]).abs().max()) for group in groups
    )
    if others > LEAK * own:
        hint = "mixes the rows of a batch: a row's loss depends on the tokens of its neighbours"
        raise user_error("model", type(model).__name__, hint)
    if max(last, pads) > LEAK * own:
        hint = (
            "sees the tokens that it is to predict: its attention is not causal "
            "(a model of BERT's kind needs is_decoder=true in its config.json)"
        )
        raise user_error("model", type(model).__name__, hint)


@torch.no_grad()
def _where(row_losses: RowLosses, batch: MixedBatch, other: MixedBatch, exact: bool) -> str:
    """The first module whose output for the tested row differs between two batches, for a message."""
    outputs = []
    for inputs in (batch, other):
        with _first_rows(row_losses.model, len(inputs.adapter_ids)) as states:
            row_losses(inputs)
        outputs.append(states)
    for name, states_in_batch in outputs[0].items():
        states_in_other = outputs[1].get(name)
        if states_in_other is None or states_in_other.shape != states_in_batch.shape:
            continue
        if (states_in_other - states_in_batch).norm() > GRADIENT[exact] * states_in_batch.norm():
            return f"; rows meet in {name}"
    return ""


@contextmanager
def _first_rows(model: nn.Module, rows: int) -> Iterator[dict[str, Tensor]]:
    """Module -> the tested row's part of its first output, in the order in which modules finish."""
    captured: dict[str, Tensor] = {}

    def capture(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(states, Tensor) or states.dim() != 3:
                return
            if states.shape[0] == rows and states.shape[1] >= TESTED:
                captured.setdefault(name, states[0, :TESTED].float())

        return hook

    handles = [module.register_forward_hook(capture(name)) for name, module in model.named_modules() if name]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
