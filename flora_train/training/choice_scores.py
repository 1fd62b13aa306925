"""Scores of the words of labels: how probable base and adapters find each word after each prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Collate, Row, collate
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.task import Task
from flora_train.training.loss import RowLosses
from flora_train.training.result_log import ResultLog
from flora_train.training.row_nats import compute_nats


@dataclass(frozen=True)
class ChoiceScores:
    """The scores of the words of a task's labels on its first n evaluated examples."""

    task: str
    spec: LabelSpec
    references: NDArray[np.int64]
    """[n], the number of each example's label."""
    log_probabilities: Mapping[int, NDArray[np.float64]]
    """Contender id (-1: base) -> [n, labels], summed over the tokens of a word."""

    def predictions(self, contender: int) -> NDArray[np.int64]:
        """The number of the label with the most probable word, [n]; of equal ones the first."""
        return self.log_probabilities[contender].argmax(axis=1)

    def probabilities(self, contender: int) -> NDArray[np.float64]:
        """Probability of each label, [n, labels], if one of the words is written."""
        scores = self.log_probabilities[contender]
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def accuracy(self, contender: int) -> float:
        """The share of examples whose label is predicted."""
        return float((self.predictions(contender) == self.references).mean())


def score_choices(
    row_losses: RowLosses,
    bank: AdapterBank,
    tasks: Mapping[str, Task],
    *,
    max_tokens: int,
    pad_token: int,
    max_examples: int | None = None,
    collate: Collate = collate,
    absent: Collection[int] = (),
    report: Callable[[float], None] = lambda share: None,
    log: ResultLog | None = None,
    during_training: bool = False,
) -> dict[str, ChoiceScores]:
    """Task -> its scores, of the tasks with a verbalizer. Base and adapters are mixed in the same batches.
    Collective.

    max_tokens: padded tokens per forward pass; max_examples: limit per task; absent: adapters that are not
    evaluated; report: called with the share done; log: batches in it are not computed again;
    during_training: score the adapters alone, on validation rows.
    """
    splits = {name: task.validation if during_training else task.evaluated for name, task in tasks.items()}
    chosen = {name: split for name, split in splits.items() if isinstance(split, ChoiceSplit)}
    rows: list[Row] = []
    contenders: dict[str, list[int]] = {}
    for name, split in chosen.items():
        ids = [i for i, spec in enumerate(bank.specs) if spec.task == name and i not in absent]
        if ids:
            contenders[name] = ids if during_training else [BASE_ID, *ids]
            rows += _rows(name, split, contenders[name], _examples(split, max_examples))
    if not rows:
        return {}
    nats = compute_nats(
        row_losses,
        bank,
        rows,
        chosen.__getitem__,
        max_tokens=max_tokens,
        pad_token=pad_token,
        collate=collate,
        report=report,
        log=log,
    )
    results, start = {}, 0
    for name, ids in contenders.items():
        split = chosen[name]
        examples, labels = _examples(split, max_examples), len(split.label_names)
        size = examples * len(ids) * labels
        shaped = -nats[start : start + size].reshape(examples, len(ids), labels)
        start += size
        scores = {contender: shaped[:, place] for place, contender in enumerate(ids)}
        spec = LabelSpec("single", split.label_names)
        results[name] = ChoiceScores(name, spec, split.references[:examples], scores)
    return results


def _examples(split: ChoiceSplit, limit: int | None) -> int:
    return min(len(split), limit or len(split))


def _rows(task: str, split: ChoiceSplit, contenders: list[int], examples: int) -> list[Row]:
    """The rows of the first examples: for each contender one for each label."""
    rows = []
    for example in range(examples):
        lengths = [split.choice_length(example, label) for label in range(len(split.label_names))]
        for contender in contenders:
            for label, length in enumerate(lengths):
                rows.append(Row(contender, task, example, length, document=label + 1))
    return rows
