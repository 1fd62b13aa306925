"""The splits of a task of labelled texts, from its encoded rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from flora_train.config.task_schema import TaskConfig
from flora_train.data.labels.choices import choice_split
from flora_train.data.labels.resolve import check_splits, label_spec, note_single_rows
from flora_train.data.labels.rows import LabelRowEncoder
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.labels.split import label_split
from flora_train.data.labels.survey import LabelSurvey
from flora_train.data.labels.verbalizer import VerbalizerRowEncoder
from flora_train.data.token_split import TokenSplit


@dataclass(frozen=True)
class LabelledTexts:
    """The splits of a task."""

    splits: dict[str, TokenSplit]
    """LabelSplits, or ChoiceSplits of a verbalizer."""
    label: LabelSpec | None
    """None: there is no head."""


def labelled_texts(
    task: TaskConfig,
    encoder: LabelRowEncoder | VerbalizerRowEncoder,
    tokens: Mapping[str, TokenSplit],
    surveys: Mapping[str, LabelSurvey],
) -> LabelledTexts:
    """Check the labels of all splits. task: as it was configured; tokens: split -> its encoded rows; surveys:
    source -> its labels. Raises UserError as `check_splits` does."""
    divides_rows = "validation" not in surveys or task.test_fraction is not None
    if task.is_stratified and divides_rows:
        note_single_rows(surveys["train"])
    has_words = isinstance(encoder, VerbalizerRowEncoder)
    alone = dict(tokens)
    if has_words:
        alone = {split: _without_places(one) for split, one in tokens.items()}
    spec = label_spec(encoder.task, alone["train"], encoder.reader)
    labelled = {split: label_split(one, spec) for split, one in alone.items()}
    check_splits(labelled, surveys, are_named=task.known_labels is not None)
    if isinstance(encoder, VerbalizerRowEncoder):
        return LabelledTexts({split: choice_split(one, encoder.words) for split, one in tokens.items()}, None)
    return LabelledTexts(dict(labelled), spec)


def _without_places(split: TokenSplit) -> TokenSplit:
    """A split of prompts and words whose targets are the labels alone."""
    labels = np.asarray(split.targets)[0::2]
    return replace(split, targets=labels, target_offsets=np.arange(len(labels) + 1, dtype=np.int64))
