"""Checks that a row's loss depends on its own past tokens alone, by running the model once, before training (guarantee I1)."""

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
from flora_train.models.probe_inputs import (
    device_of,
    gradients_enabled,
    plain_tokens,
    preserved_state,
    probe_inputs,
)
from flora_train.models.speech_encoder import is_speech_model
from flora_train.training.loss import RowLosses

ASKED, SHORT, LONG = 4, 6, 9
"""Tokens of the row that is asked about, and of its neighbours in two batches."""
LOSS, GRADIENT = {True: 5e-4, False: 2e-2}, {True: 5e-3, False: 0.15}
"""Relative changes that are rounding, in float32 and in 16 bits: of a loss, and of a gradient."""
LEAK = 1e-4
"""Share of the largest gradient up to which one is none."""


@dataclass(frozen=True)
class _Rows:
    """Tokens of the asked row, its neighbours in one batch, and in another."""

    asked: Tensor
    neighbours: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    pad: int


def check_rows(model: Any, pad_token: int, features: Tensor | None = None) -> None:
    """Raises UserError where the loss or gradient of a row changes with its neighbours or the padding that they cause, where it sees
    the tokens that it is to predict, or where it is drawn at random. features: [1, ...] of a clip, for a speech model.

    Nothing of the model changes. Collective where the base is divided.
    """
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    if (encoder_decoder and not is_speech_model(model.config)) or probe_inputs(model, 1, 2, features) is None:
        return
    if model.get_output_embeddings() is None:
        raise user_error(
            "model",
            type(model).__name__,
            "has no output head that makes logits of its last states: it cannot be trained here",
        )
    try:
        with preserved_state(model, training=True):
            _check(RowLosses(model), _rows(model, pad_token), features)
    except UserError:
        raise
    except Exception as error:
        words = f"cannot compute losses of a few rows, as training would: {type(error).__name__}: {first_line(error)}"
        raise user_error("model", type(model).__name__, words) from error


def _check(row_losses: RowLosses, rows: _Rows, features: Tensor | None) -> None:
    model = row_losses.model
    exact = next(model.parameters()).dtype not in (torch.bfloat16, torch.float16)
    batch, other = (
        _batch(model, (rows.asked, *beside), rows.pad, features) for beside in (rows.neighbours, rows.others)
    )
    torch.manual_seed(0)
    loss, gradient = _loss(row_losses, batch, rows)
    torch.manual_seed(1)
    beside, turned = _loss(row_losses, other, rows)
    with torch.no_grad():
        alone = float(row_losses(_batch(model, (rows.asked,), rows.pad, features))[0])
        last = alone
        if not is_speech_model(model.config):  # whose rows hear different clips
            # what is left for the last row where experts take so many tokens of a batch and no more
            last = float(
                row_losses(_batch(model, (*rows.neighbours, *rows.others, rows.asked), rows.pad, features))[
                    -1
                ]
            )
    changed = max(abs(found - loss) for found in (beside, alone, last))
    if changed <= LOSS[exact] * abs(loss) and (turned - gradient).norm() <= GRADIENT[exact] * gradient.norm():
        return
    torch.manual_seed(2)
    again, drawn = _loss(row_losses, batch, rows)
    if (
        abs(again - loss) > LOSS[exact] * abs(loss)
        or (drawn - gradient).norm() > GRADIENT[exact] * gradient.norm()
    ):
        words = "draws random numbers while it trains, which depend on the other rows of a batch: set its dropout and noise to 0"
        raise user_error("model", type(model).__name__, words)
    what = f"loss by {changed / abs(loss):.0%}" if changed > LOSS[exact] * abs(loss) else "gradient"
    raise user_error(
        "model",
        type(model).__name__,
        f"changes a row's {what} {_BESIDE}{_where(row_losses, batch, other, exact)}",
    )


_BESIDE = "with what stands beside it in the batch (its rows mix, or it expects padding on the left), so that adapters would not be apart"


def _rows(model: Any, pad_token: int) -> _Rows:
    ids = list(
        plain_tokens(model, ASKED + 2 * SHORT + LONG, without=[pad_token]).split([ASKED, SHORT, SHORT, LONG])
    )
    return _Rows(ids[0], (ids[1], ids[2]), (ids[3],), pad_token)


def _batch(model: Any, rows: Sequence[Tensor], pad: int, features: Tensor | None) -> MixedBatch:
    """These rows, right-padded, all learnt."""
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
    """The asked row's loss, and its gradient at the embeddings of its own tokens.

    Raises UserError where it has a gradient elsewhere: at its last token, which is only predicted, at padding, or in other rows.
    """
    with gradients_enabled(row_losses.model) as caught:
        losses = row_losses(batch)
        losses[0].backward()
    own = []
    for ids, embeddings in caught:
        if embeddings.shape[:-1] == ids.shape and embeddings.grad is not None:
            _check_reads_its_past(row_losses.model, ids, embeddings.grad, rows)
            own += [embeddings.grad[ids == token].float().flatten() for token in rows.asked]
    return float(losses[0].detach()), torch.cat(own) if own else torch.zeros(1)


def _check_reads_its_past(model: nn.Module, ids: Tensor, gradient: Tensor, rows: _Rows) -> None:
    """gradient: of the asked row's loss at the embeddings of `ids`."""
    padding = torch.tensor([rows.pad], device=ids.device)
    groups = (rows.asked[:-1], rows.asked[-1:], torch.cat([*rows.neighbours, *rows.others]), padding)
    own, last, others, pads = (
        float((gradient * torch.isin(ids, group)[..., None]).abs().max()) for group in groups
    )
    if others > LEAK * own:
        raise user_error(
            "model",
            type(model).__name__,
            "mixes the rows of a batch: a row's loss depends on the tokens of its neighbours",
        )
    if max(last, pads) > LEAK * own:
        words = "sees the tokens that it is to predict: its attention is not causal (a model of BERT's kind needs is_decoder=true in its config.json)"
        raise user_error("model", type(model).__name__, words)


@torch.no_grad()
def _where(row_losses: RowLosses, batch: MixedBatch, other: MixedBatch, exact: bool) -> str:
    """The first module whose output for the asked row differs between two batches, in words."""
    seen = []
    for one in (batch, other):
        with _first_rows(row_losses.model, len(one.adapter_ids)) as outputs:
            row_losses(one)
        seen.append(outputs)
    for name, states in seen[0].items():
        beside = seen[1].get(name)
        if (
            beside is not None
            and beside.shape == states.shape
            and (beside - states).norm() > GRADIENT[exact] * states.norm()
        ):
            return f"; rows meet in {name}"
    return ""


@contextmanager
def _first_rows(model: nn.Module, rows: int) -> Iterator[dict[str, Tensor]]:
    """Module -> the asked row's part of its first output, in the order in which modules end."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) and output else output
            if (
                isinstance(states, Tensor)
                and states.dim() == 3
                and states.shape[0] == rows
                and states.shape[1] >= ASKED
            ):
                found.setdefault(name, states[0, :ASKED].float())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
