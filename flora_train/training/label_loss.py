"""Losses of labelled texts: what the heads of a batch's adapters make of the body's last states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.heads import rows_of_heads
from flora_train.data.batch import IGNORE, MixedBatch
from flora_train.data.labels.spec import LabelSpec, Target
from flora_train.data.labels.split import LabelSplit
from flora_train.data.task import Task


class LabelLosses:
    """Computes the losses of labelled texts."""

    def __init__(self, bank: AdapterBank, tasks: Mapping[str, Task]) -> None:
        self.bank = bank
        self.specs = {name: task.label for name, task in tasks.items() if task.label is not None}
        """Task -> its labels."""
        self.outputs: dict[int, Tensor] = {}
        """Position of a row in the last batch -> its outputs, [n] or [tokens, n], where no gradients are
        computed."""

    def __call__(self, batch: MixedBatch, states: Tensor) -> Tensor:
        """Sum of the losses of every row, float32 [B]: 0 for rows of other tasks.

        states: [B, L, d], the body's last states. The weight of a row's loss is that of `label_weight`. Where
        the model is not routed, the losses are a mean of the states, whose backward costs the same.
        """
        losses = torch.zeros(len(batch.rows), dtype=torch.float32, device=states.device)
        self.outputs = {}
        routing = self.bank.router.routing
        if routing is None:
            return losses + states.float().mean(dim=(1, 2))
        lengths = torch.tensor([row.tokens for row in batch.rows], device=states.device)
        heads = list(rows_of_heads(routing))
        # One gather and one split of all rows with a head: the backward of an index for each adapter would
        # fill the whole batch with zeros as many times.
        ordered = [row for rows, _, _ in heads for row in rows]
        gathered = states.index_select(0, torch.tensor(ordered, dtype=torch.long, device=states.device))
        parts = gathered.split([len(rows) for rows, _, _ in heads])
        for (rows, head, parameters), part in zip(heads, parts, strict=True):
            longest = max(batch.rows[row].tokens for row in rows)
            index = torch.tensor(rows, device=states.device)
            outputs = head(part[:, :longest], lengths[index], parameters)
            spec = self.specs[batch.rows[rows[0]].task]
            targets = _targets(batch, rows)
            losses = losses.index_add(0, index, row_losses(spec, outputs, targets).float())
            if not torch.is_grad_enabled():
                self._keep(batch, rows, outputs)
        return losses

    def _keep(self, batch: MixedBatch, rows: Sequence[int], outputs: Tensor) -> None:
        for place, row in enumerate(rows):
            values = outputs[place]
            if values.dim() == 2:
                values = values[: batch.rows[row].tokens]
            self.outputs[row] = values.float()


def _targets(batch: MixedBatch, rows: Sequence[int]) -> list[Target]:
    targets: list[Target] = []
    for row in rows:
        target = None if batch.targets is None else batch.targets[row]
        assert target is not None
        targets.append(target)
    return targets


def row_losses(spec: LabelSpec, outputs: Tensor, targets: Sequence[Target]) -> Tensor:
    """The loss of each row, [B], times its weight.

    single: cross-entropy. multi: the mean over the labels of the binary cross-entropy. regression: the
    squared error. tokens: the sum of cross-entropies of the tokens that have a label.
    """
    device, outputs = outputs.device, outputs.float()
    weights = None
    if spec.class_weights is not None:
        weights = torch.tensor(spec.class_weights, device=device)
    if spec.task_type == "regression":
        return (outputs[:, 0] - torch.tensor(targets, dtype=torch.float32, device=device)).square()
    if spec.task_type == "multi":
        expected = torch.tensor(targets, dtype=torch.float32, device=device)
        return F.binary_cross_entropy_with_logits(outputs, expected, reduction="none").mean(dim=1)
    if spec.task_type == "single":
        return F.cross_entropy(outputs, torch.tensor(targets, device=device), weights, reduction="none")
    length = outputs.shape[1]
    expected = torch.full((len(targets), length), IGNORE)
    for row, target in enumerate(targets):
        assert isinstance(target, tuple)
        expected[row, : len(target)] = torch.tensor(target, dtype=torch.long)
    losses = F.cross_entropy(
        outputs.transpose(1, 2), expected.to(device), weights, ignore_index=IGNORE, reduction="none"
    )
    return losses.sum(dim=1)


def label_weight(split: LabelSplit, example: int) -> float:
    """The weight of an example in the mean that an adapter's loss is: that of its class, of its tokens'
    classes, or 1."""
    target, weights = split.target(example), split.spec.class_weights
    if split.spec.task_type == "tokens":
        assert isinstance(target, tuple)
        labels = [int(label) for label in target if label != IGNORE]
        return float(len(labels)) if weights is None else sum(weights[label] for label in labels)
    if split.spec.task_type == "single" and weights is not None:
        assert isinstance(target, int)
        return weights[target]
    return 1.0
