"""Losses of every row: of its next tokens, without the logits of all positions at once, or of its label."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flora_train.data.batch import IGNORE, MixedBatch
from flora_train.models.encoders import reads_token_types
from flora_train.models.speech_encoder import as_encoder_outputs, model_inputs
from flora_train.training.label_loss import LabelLosses
from flora_train.training.pooling import Embeddings, pool
from flora_train.training.step_timer import StepTimer

CHUNK = 128
"""Number of positions whose logits are in memory at once."""


@dataclass(frozen=True)
class RowOutputs:
    """What the losses of the rows of a batch are made of."""

    nats: Tensor
    """The loss of every row, float32 [B]: -log p of its label tokens, or of its label."""
    embeddings: Embeddings | None = None
    """Of the rows that have one."""


class RowLosses:
    """Losses of a model, summed per row. Determines once, at the start, how the model makes its logits."""

    def __init__(
        self, model: nn.Module, timer: StepTimer | None = None, labels: LabelLosses | None = None
    ) -> None:
        self.model = model
        self.labels = labels
        """Of labelled texts; None where no adapter has a head."""
        self.head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        """None for an encoder, all of whose rows have labels."""
        self.encoder_decoder = _is_encoder_decoder(model)
        self._reads_types = self.head is None and reads_token_types(model)
        self.head_makes_logits = self.head is not None and _head_makes_logits(model, self.head)
        self.timer = timer or StepTimer(next(model.parameters()).device, 1)

    def outputs(self, batch: MixedBatch) -> RowOutputs:
        """The losses of every row, and embeddings, of one forward pass."""
        if batch.poolings is None:
            return RowOutputs(self(batch))
        with _body_states(self.model) as states:
            nats = self(batch)
        with self.timer.part("loss"):
            return RowOutputs(nats, pool(states[0], batch))

    @cached_property
    def width(self) -> int:
        """Size of the last hidden states, found by running the model on one token. Collective where the base
        is sharded."""
        device = next(self.model.parameters()).device
        with torch.no_grad(), _body_states(self.model) as states:
            self.model(
                input_ids=torch.ones(1, 1, dtype=torch.long, device=device),
                attention_mask=torch.ones(1, 1, dtype=torch.long, device=device),
            )
        return states[0].shape[-1]

    def __call__(self, batch: MixedBatch) -> Tensor:
        """Sum of the losses of every row, float32 [B], differentiable once: of next tokens (in nats), or of
        its label.

        A causal model's labels are its inputs: position i predicts label i + 1. An encoder-decoder's decoder
        reads them shifted right (decoder_input_ids of the batch): position i predicts label i. Logits are
        computed only at positions with a label and, unless the architecture changes them after the output
        head (soft caps, scales), only CHUNK of them at a time.
        """
        if batch.targets is None or self.labels is None:
            return self._next_tokens(batch)
        with _body_states(self.model) as states:
            losses = self._next_tokens(batch)
        with self.timer.part("loss"):
            return losses + self.labels(batch, states[0])

    def _next_tokens(self, batch: MixedBatch) -> Tensor:
        inputs = model_inputs(self.model, batch)
        if not self._reads_types:
            inputs.pop("token_type_ids", None)
        if self.head is None:
            self.model(**inputs)
            return torch.zeros(len(batch.labels), device=batch.labels.device)
        labels = batch.labels if self.encoder_decoder else F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
        learnt = labels != IGNORE
        with _head_input(self.head, learnt, first_only=self.head_makes_logits) as hidden:
            logits = self.model(**inputs, use_cache=False).logits
        with self.timer.part("loss"):
            if self.head_makes_logits:
                losses = ChunkedCrossEntropy.apply(
                    hidden[0], self.head.weight, self.head.bias, labels[learnt]
                )
            else:
                losses = F.cross_entropy(logits[0].float(), labels[learnt], reduction="none")
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[learnt]
        return losses.new_zeros(len(labels)).index_add(0, rows, losses)


@contextmanager
def _body_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Capture the last states [B, L, d] of the model's body."""
    caught: list[Tensor] = []
    body: nn.Module = model.base_model  # type: ignore[assignment]
    handle = body.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        handle.remove()


class ChunkedCrossEntropy(torch.autograd.Function):
    """-log softmax(hidden weight^T + bias)[target] per position, through a frozen head.

    hidden: [n, d]; weight: [V, d]; bias: [V] or None; targets: int64 [n]. Returns float32 [n]. The gradient
    is made in the forward, chunk by chunk, so that [n, V] never exists (the idea of Liger-Kernel's fused
    linear cross entropy).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(
            len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device
        )
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            logits = F.linear(hidden[part], weight, bias).to(losses.dtype)
            picked = targets[part, None]
            # The softmax kernels work row by row. exp and logsumexp do not: on CPU they run through a vector
            # library that takes another path for a whole block once it meets a NaN, and so changes the last
            # bits of other adapters.
            losses[part] = -logits.log_softmax(dim=1).gather(1, picked)[:, 0]
            if gradient is not None:
                probabilities = logits.softmax(dim=1)
                probabilities.scatter_add_(1, picked, -torch.ones_like(picked, dtype=losses.dtype))
                gradient[part] = probabilities.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses[:, None].to(gradient.dtype), None, None, None


@contextmanager
def _head_input(head: nn.Module, learnt: Tensor, first_only: bool) -> Iterator[list[Tensor]]:
    """Capture the hidden states [n, d] at the label positions of [B, L]. The head receives them as [1, n, d],
    or only the first of them where its output is not used.
    """
    caught: list[Tensor] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0][learnt])
        return (caught[0][None, :1].detach() if first_only else caught[0][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield caught
    finally:
        handle.remove()


@torch.no_grad()
def _head_makes_logits(model: nn.Module, head: nn.Module) -> bool:
    """Whether the model's logits are the output of its linear head, tested on one token."""
    if not isinstance(head, nn.Linear):
        return False
    token = torch.ones(1, 1, dtype=torch.long, device=head.weight.device)
    inputs: dict[str, Any] = {"input_ids": token}
    if _is_encoder_decoder(model):
        width: int = model.config.hidden_size  # type: ignore
        encoded = torch.zeros(1, 1, width, dtype=head.weight.dtype, device=head.weight.device)
        inputs = {"encoder_outputs": as_encoder_outputs(encoded), "decoder_input_ids": token}
    with _head_input(head, token.bool(), first_only=False) as hidden:
        logits = model(**inputs, use_cache=False).logits
    return torch.equal(head(hidden[0]), logits[0])


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
