"""LabelSplit: the tokens of labelled texts, and what each of them is labelled with."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from flora_train.data.labels.spec import LabelSpec, Target
from flora_train.data.token_split import TokenSplit


@dataclass(frozen=True)
class LabelSplit(TokenSplit):
    """A TokenSplit whose examples are whole texts, or pairs of texts, with their special tokens. No token of
    them is learnt as the next one."""

    spec: LabelSpec

    def target(self, index: int) -> Target:
        """The label of an example.

        single: the number of its label. multi: 1.0 for each label that it has, else 0.0. regression: a
        number. tokens: for each token the number of its label, IGNORE (-100) where it has none.
        """
        values = self.target_values(index)
        if self.spec.task_type == "single":
            return int(values[0])
        if self.spec.task_type == "regression":
            return float(values[0])
        if self.spec.task_type == "tokens":
            return tuple(map(int, values))
        return tuple(map(float, values))

    def target_values(self, index: int) -> NDArray[np.float64]:
        """The numbers of `target`, as they are stored."""
        return self.targets[self.target_offsets[index] : self.target_offsets[index + 1]]

    def target_text(self, index: int) -> str:
        """The label of an example, or its labels, or its number, as text; of a tagged text, the labels of its
        tokens."""
        values = self.target_values(index)
        if self.spec.task_type == "regression":
            return f"{values[0]:g}"
        if self.spec.task_type == "multi":
            has = [label for label, value in zip(self.spec.labels, values, strict=True) if value > 0]
            return ", ".join(has) or "no label"
        return " ".join(self.spec.labels[int(value)] for value in values if value >= 0)

    def types(self, index: int) -> NDArray[np.int8] | None:
        """The token types of an example (0 for the first text of a pair, 1 for the second, with most
        tokenizers); None if the tokenizer has none."""
        if not len(self.token_types):
            return None
        return self.token_types[self.offsets[index] : self.offsets[index + 1]]

    @property
    def label_counts_by_name(self) -> dict[str, int]:
        """Label -> number of examples that have it, or of tokens; empty for regression."""
        values = np.asarray(self.targets)
        if self.spec.task_type == "regression":
            return {}
        if self.spec.task_type == "multi":
            counts = values.reshape(-1, len(self.spec.labels)).sum(axis=0)
        else:
            counts = np.bincount(label_numbers(self), minlength=len(self.spec.labels))
        return {label: int(count) for label, count in zip(self.spec.labels, counts, strict=True)}


def label_numbers(split: TokenSplit) -> NDArray[np.int64]:
    """int64: the labels of all examples with one label each, or of all tokens that have one."""
    values = np.asarray(split.targets)
    return values[values >= 0].astype(np.int64)


def label_split(split: TokenSplit, spec: LabelSpec) -> LabelSplit:
    """The labelled texts that encoded documents are."""
    content = {field.name: getattr(split, field.name) for field in fields(TokenSplit)}
    return LabelSplit(**content, spec=spec)
