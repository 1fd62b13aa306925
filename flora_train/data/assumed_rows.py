"""Tasks for planning where the rows are not on this machine: every example has the same length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.audio.speech_split import Utterance, speech_split
from flora_train.data.labels.reader import label_type_of
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.split import label_split
from flora_train.data.task import Task
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after

TRANSCRIPT_TOKENS = 40
"""Decoder tokens of a clip: a sentence of Common Voice with its prompt."""
ASSUMED_LABELS = ("first", "second")
"""Labels of a task that names none."""
EXAMPLES = 64
"""Examples of an assumed split; a mixture repeats them."""


def assumed_tasks(config: RunConfig, window: int = 0) -> dict[str, Task]:
    """The tasks that some adapter learns.

    Texts have training.max_length tokens, as packed rows do. window: encoder positions of a clip, whose
    transcript has TRANSCRIPT_TOKENS; 0 for text.
    """
    learnt: set[str] = set()
    for adapter in config.adapters.values():
        learnt.update(adapter.tasks or config.tasks)
    tasks = {}
    for name, task in config.tasks.items():
        if name in learnt:
            train = _split(config.training.max_length, EXAMPLES, window)
            validation = _split(config.training.max_length, heldout_examples(task), window)
            label = None
            if task.has_head:
                label = assumed_labels(task)
                train, validation = _labelled(train, label), _labelled(validation, label)
            tasks[name] = Task(name, task.weight, train, validation, data_hash="", label=label)
    return tasks


def assumed_labels(task: TaskConfig) -> LabelSpec:
    """The labels that a task names, else two."""
    task_type = label_type_of(task)
    if task_type == "regression":
        return LabelSpec(task_type)
    return LabelSpec(task_type, tuple(task.known_labels or ASSUMED_LABELS))


def _labelled(split: TokenSplit, label: LabelSpec) -> TokenSplit:
    """The same examples, all labelled with the first label."""
    offsets = np.arange(len(split) + 1, dtype=np.int64) * label.outputs
    if label.task_type in ("single", "regression"):
        offsets = np.arange(len(split) + 1, dtype=np.int64)
    elif label.task_type == "tokens":
        offsets = split.offsets
    nothing_learnt = np.zeros(len(split) + 1, dtype=np.int64)
    return label_split(
        replace(
            split,
            spans=np.empty((0, 2), dtype=np.int32),
            span_offsets=nothing_learnt,
            targets=np.zeros(int(offsets[-1])),
            target_offsets=offsets,
        ),
        label,
    )


def heldout_examples(task: TaskConfig) -> int:
    """The most held-out examples of a task; EXAMPLES where its recipe sets no limit."""
    return task.max_validation_examples or EXAMPLES


def _split(length: int, examples: int, window: int) -> TokenSplit:
    if window:
        tokens = np.zeros(min(length, TRANSCRIPT_TOKENS), dtype=np.int32)
        clip = Utterance("", "", 0.0, "", 0, window, tokens)
        return speech_split([clip] * examples, 1, SplitCounts(rows=examples))
    return TokenSplit(
        tokens=np.zeros(examples * length, dtype=np.int32),
        offsets=np.arange(examples + 1, dtype=np.int64) * length,
        **spans_after(np.zeros(examples), np.full(examples, length)),
        label_bytes=np.zeros(examples, dtype=np.int64),
        pack_offsets=np.arange(examples + 1, dtype=np.int64),
        counts=SplitCounts(rows=examples, documents=examples, examples=examples),
    )
