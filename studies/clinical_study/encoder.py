"""Comparison runs with plain torch and transformers: full fine-tuning, and the gated residual head.

The gated residual head follows "The Impact of LoRA Adapters on LLMs for Clinical Text Classification Under
Computational and Data Constraints" (arXiv 2407.19299), which puts a Gated Residual Network between the output
of an encoder and the classifier. The network is that of Lim et al., "Temporal Fusion Transformers" (arXiv
1912.09363, equations 2 to 5), without context:

    e = W1 ELU(W2 a + b2) + b1
    y = LayerNorm(a + sigmoid(W4 e + b4) * (W5 e + b5))

with dropout on e and a linear classifier on y. `a` is what the frozen encoder's pooler gives for a text; all
widths are the encoder's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .tasks import StudyTask

STEPS, BATCH = 30, 16
"""Optimizer steps, and texts of each, as max_steps and examples_per_draw of recipe=clinical."""
MAX_LENGTH = 128
"""Tokens of the longest text, as training.max_length of the recipe."""
WARMUP_RATIO = 0.1
TEST_BATCH = 64
DROPOUT = 0.1


@dataclass(frozen=True)
class Settings:
    """How a method is trained."""

    lr: float
    balanced: bool = True
    """Weigh each label inversely to its frequency in training, as class_weights: balanced does."""
    weight_decay: float = 0.01
    steps: int = STEPS


class GatedResidualHead(nn.Module):
    """A Gated Residual Network and a linear classifier."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(DROPOUT)
        self.gate = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, labels)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, labels] of features [B, width]."""
        hidden = self.outer(nn.functional.elu(self.inner(features)))
        hidden = self.dropout(hidden)
        gated = torch.sigmoid(self.gate(hidden)) * self.value(hidden)
        logits: Tensor = self.classifier(self.norm(features + gated))
        return logits


class Encoder:
    """The folder of an encoder, its tokenizer, and features of the frozen model."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._features: dict[str, Tensor] = {}

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """A padded batch."""
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return dict(encoded)

    def features(self, texts: Sequence[str]) -> Tensor:
        """What the pooler of the frozen encoder gives for each text, [texts, width]; computed once a text."""
        missing = sorted({text for text in texts if text not in self._features}, key=len)
        if missing:
            from transformers import AutoModel

            model = AutoModel.from_pretrained(self.folder).eval()
            for first in range(0, len(missing), TEST_BATCH):
                batch = missing[first : first + TEST_BATCH]
                with torch.inference_mode():
                    pooled = model(**self.inputs(batch)).pooler_output
                self._features |= dict(zip(batch, pooled.clone(), strict=True))
        return torch.stack([self._features[text] for text in texts])

    def classifier(self, labels: int) -> Any:
        """transformers' own classifier on this encoder, its last layer new."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=labels)


def gated(task: StudyTask, encoder: Encoder, seed: int, settings: Settings) -> list[str]:
    """Train the gated residual head on frozen features; the labels that it predicts."""
    torch.manual_seed(seed)
    train, test = encoder.features(task.train.texts), encoder.features(task.test.texts)
    head = GatedResidualHead(train.shape[1], len(task.labels))
    fit(task, head, lambda rows: head(train[rows]), seed, settings=settings)
    head.eval()
    with torch.inference_mode():
        return _named(task, head(test))


def full(task: StudyTask, encoder: Encoder, seed: int, settings: Settings) -> list[str]:
    """Fine-tune all parameters of transformers' classifier; the labels that it predicts."""
    torch.manual_seed(seed)
    model = encoder.classifier(len(task.labels))

    def logits(rows: Tensor) -> Tensor:
        texts = [task.train.texts[row] for row in rows.tolist()]
        result: Tensor = model(**encoder.inputs(texts)).logits
        return result

    fit(task, model, logits, seed, settings=settings)
    return predict(task, model, encoder)


def fit(
    task: StudyTask, model: nn.Module, logits: Callable[[Tensor], Tensor], seed: int, *, settings: Settings
) -> None:
    """AdamW with linear warm-up and decay. logits: rows of the training set -> [rows, labels]."""
    targets = torch.tensor(task.targets)
    weight = label_weights(targets, len(task.labels)) if settings.balanced else None
    loss = nn.CrossEntropyLoss(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    model.train()
    for _, rows in zip(range(settings.steps), batches(len(targets), seed), strict=False):
        optimizer.zero_grad()
        loss(logits(rows), targets[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step (from 0): linear warm-up, then linear to zero."""
    warmup = max(1, round(WARMUP_RATIO * steps))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / (steps - warmup))


def batches(examples: int, seed: int) -> Iterator[Tensor]:
    """Rows of one batch after the other, every epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    size = min(BATCH, examples)
    while True:
        while len(queue) < size:
            queue += torch.randperm(examples, generator=generator).tolist()
        yield torch.tensor(queue[:size])
        del queue[:size]


def label_weights(targets: Tensor, labels: int) -> Tensor:
    """Rows / (labels x rows of the label), as in scikit-learn."""
    counts = torch.bincount(targets, minlength=labels)
    return len(targets) / (labels * counts)


def predict(task: StudyTask, model: nn.Module, encoder: Encoder) -> list[str]:
    """The labels that a classifier of transformers predicts for the test texts."""
    order = sorted(range(len(task.test.texts)), key=lambda i: len(task.test.texts[i]))
    predicted = [""] * len(order)
    for part in range(math.ceil(len(order) / TEST_BATCH)):
        rows = order[part * TEST_BATCH : (part + 1) * TEST_BATCH]
        with torch.inference_mode():
            logits = model(**encoder.inputs([task.test.texts[row] for row in rows])).logits
        for row, label in zip(rows, _named(task, logits), strict=True):
            predicted[row] = label
    return predicted


def _named(task: StudyTask, logits: Tensor) -> list[str]:
    return [task.labels[i] for i in logits.argmax(dim=1).tolist()]
