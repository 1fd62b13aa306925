"""Keys of tasks whose texts are labelled: classes, several labels, numbers, or one label for each token."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from flora_train.config.base import Text
from flora_train.config.preference_schema import PreferenceKeys

MOST_LABELS = 10_000
"""Labels of one task."""
LABEL_KEYS = (
    "token_labels",
    "labels",
    "multi_label",
    "regression",
    "class_weights",
    "verbalizer",
    "stratify",
)
"""Keys of labelled texts, beside `label`."""


def _as_label(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is true or false to YAML: put labels such as yes, no, true and false in quotes")
    return value


def _labels_are_text(value: Any) -> Any:
    """Labels that are keys of a mapping."""
    if isinstance(value, dict):
        return {_as_label(label): other for label, other in value.items()}
    return value


Label = Annotated[Text, BeforeValidator(_as_label)]
HIGHEST_WEIGHT = 1e6
"""Of a label."""
Weight = Annotated[float, Field(gt=0, le=HIGHEST_WEIGHT)]


class LabelKeys(PreferenceKeys):
    """The keys of a task of labelled texts: from `label` or `token_labels`, each of its adapters learns a
    head, or, with `verbalizer`, the words of labels."""

    token_labels: Text | None = None
    """Column of lists of labels, one for each token of the text column, which holds lists of tokens (or JSON
    text of one): tagging. Default: the text is not tagged."""
    labels: list[Label] | None = Field(None, min_length=1, max_length=MOST_LABELS, validate_default=True)
    """The labels, in the order of the head's outputs. Default: those of the training rows, numbers by size
    and other labels by their characters."""
    multi_label: bool = Field(False, validate_default=True)
    """Whether a text can have several labels, or none: its cell is a list of labels, or JSON text of one."""
    label_separator: Text | None = None
    """With multi_label: what separates the labels in a cell of text, such as `;`. Default: such a cell is
    JSON text of a list, or a single label."""
    regression: bool = False
    """Whether label is a column of numbers, which the head predicts."""
    class_weights: Literal["balanced"] | dict[str, Weight] | None = None
    """Weight of each label in the loss, which is the weighted mean over the rows of an adapter in a step.
    balanced: inversely proportional to the number of training examples of a label, as in scikit-learn (rows /
    (labels x rows of the label)). A mapping: label -> weight, 1 where it has none. Default: all are equal."""
    verbalizer: dict[Label, Text] | None = Field(None, min_length=2, max_length=MOST_LABELS)
    """Label -> the word that stands for it. The base is then a causal language model, which learns the word
    after prompt instead of a head, and is evaluated by the probabilities of all words. Default: a head."""
    stratify: bool | None = None
    """Whether rows are held out and sampled (validation_fraction, test_fraction, max_examples and similar
    keys) label by label, so that all labels keep their shares. A label of two or more rows has at least one
    of them held out; the row of a label that has one is a training row. Default: true, and false with
    multi_label, regression and token_labels, which cannot be stratified."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the training rows that is set apart as test rows, before validation_fraction. If test is
    given, too, these rows are left out. Default: none."""

    @field_validator("class_weights", "verbalizer", mode="before")
    @classmethod
    def _no_booleans_as_labels(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "class_weights":
            _check_weights(value)
        return _labels_are_text(value)

    @field_validator("token_labels")
    @classmethod
    def _one_kind_of_label(cls, token_labels: str | None, info: ValidationInfo) -> str | None:
        if token_labels is None:
            return None
        if info.data.get("objective") is not None:
            raise ValueError("has no meaning with objective, which learns completions: remove one of them")
        if info.data.get("label") is not None:
            raise ValueError("labels tokens, and label whole texts: remove one of them")
        return token_labels

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if labels is None:
            return None
        _require_labels(info)
        twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
        if twice is not None:
            raise ValueError(f"names {twice!r} twice: remove one of them")
        blank = [label for label in labels if label != label.strip()]
        if blank:
            raise ValueError(f"has white space around {blank[0]!r}, which is removed from cells: remove it")
        return labels

    @field_validator("multi_label")
    @classmethod
    def _of_whole_texts(cls, multi_label: bool, info: ValidationInfo) -> bool:
        if multi_label:
            _require_label(info)
            return True
        labels = info.data.get("labels")
        if labels is not None and len(labels) < 2:
            raise ValueError(
                "is false, and labels has one label, so that there is no choice: give two or more"
            )
        return False

    @field_validator("label_separator")
    @classmethod
    def _of_several_labels(cls, separator: str | None, info: ValidationInfo) -> str | None:
        if separator is not None and info.data.get("multi_label") is False:
            raise ValueError("separates several labels: set multi_label: true, or remove it")
        return separator

    @field_validator("regression")
    @classmethod
    def _numbers_have_no_classes(cls, regression: bool, info: ValidationInfo) -> bool:
        if not regression:
            return False
        _require_label(info)
        if info.data.get("labels") is not None:
            raise ValueError("predicts a number, and labels names classes: remove one of them")
        if info.data.get("multi_label"):
            raise ValueError("predicts a number, and multi_label chooses labels: remove one of them")
        return True

    @field_validator("class_weights")
    @classmethod
    def _weights_are_of_classes(
        cls, weights: str | dict[str, float] | None, info: ValidationInfo
    ) -> str | dict[str, float] | None:
        if weights is None:
            return None
        _require_labels(info)
        for key in ("multi_label", "regression"):
            if info.data.get(key):
                raise ValueError(
                    f"weighs labels of which a text has one, and {key} is true: remove one of them"
                )
        labels = info.data.get("labels")
        if isinstance(weights, dict) and labels is not None:
            unknown = next((label for label in weights if label not in labels), None)
            if unknown is not None:
                raise ValueError(f"names {unknown!r}, which is not in labels: remove it, or add the label")
        return weights

    @field_validator("verbalizer")
    @classmethod
    def _words_of_labels(
        cls, verbalizer: dict[str, str] | None, info: ValidationInfo
    ) -> dict[str, str] | None:
        if verbalizer is None:
            return None
        _require_label(info)
        for key in ("multi_label", "regression", "class_weights"):
            if info.data.get(key):
                raise ValueError(
                    f"stands for the one label of a text, {key} belongs to a head: remove one of them"
                )
        _check_words(verbalizer, info.data.get("labels"))
        return verbalizer

    @field_validator("stratify")
    @classmethod
    def _rows_have_one_label(cls, stratify: bool | None, info: ValidationInfo) -> bool | None:
        if stratify is None:
            return None
        _require_labels(info)
        for key in ("multi_label", "regression", "token_labels"):
            if stratify and info.data.get(key):
                raise ValueError(f"divides rows by their one label, and with {key} they have none: remove it")
        return stratify

    @field_validator("test_fraction")
    @classmethod
    def _of_labelled_texts(cls, fraction: float | None, info: ValidationInfo) -> float | None:
        if fraction is not None:
            _require_labels(info)
        return fraction

    @property
    def is_labelled(self) -> bool:
        """Whether its rows are labelled texts, for a head or for the words of a verbalizer."""
        return self.token_labels is not None or (self.label is not None and self.objective is None)

    @property
    def has_head(self) -> bool:
        """Whether its adapters learn a head."""
        return self.is_labelled and self.verbalizer is None

    @property
    def is_stratified(self) -> bool:
        """Whether its rows are held out label by label."""
        has_one_label = self.label is not None and not (self.multi_label or self.regression)
        return self.is_labelled and has_one_label and self.stratify is not False

    @property
    def known_labels(self) -> list[str] | None:
        """The labels that the configuration names, in their order; None if they are read from the rows."""
        if self.labels is None and self.verbalizer is not None:
            return list(self.verbalizer)
        return self.labels


def _require_labels(info: ValidationInfo) -> None:
    """Raises ValueError if the rows have no labels."""
    if info.data.get("label") is None and info.data.get("token_labels") is None:
        raise ValueError("requires label or token_labels: name the column, or remove this key")
    if info.data.get("objective") is not None:
        raise ValueError(f"has no meaning for objective {info.data['objective']}: remove it")


def _require_label(info: ValidationInfo) -> None:
    """Raises ValueError if no column labels whole texts."""
    _require_labels(info)
    if info.data.get("token_labels") is not None:
        raise ValueError("is about labels of whole texts, and token_labels labels tokens: remove one of them")


def _check_weights(value: Any) -> None:
    """Raises ValueError for what is neither a choice nor a mapping of label -> weight."""
    if value in (None, "balanced"):
        return
    if not isinstance(value, dict) or not value:
        raise ValueError("is neither balanced nor a mapping of label -> weight: give one of them")
    for label, weight in value.items():
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not 0 < weight <= HIGHEST_WEIGHT:
            raise ValueError(
                f"has the weight {weight!r} for {label!r}: give a number of more than 0, at most 1e6"
            )


def _check_words(verbalizer: dict[str, str], labels: list[str] | None) -> None:
    """Raises ValueError if a label has no word, or the word of another one."""
    missing = next((label for label in labels or () if label not in verbalizer), None)
    if missing is not None:
        raise ValueError(f"has no word for the label {missing!r}: add one")
    unknown = next((label for label in verbalizer if labels is not None and label not in labels), None)
    if unknown is not None:
        raise ValueError(f"has a word for {unknown!r}, which is not in labels: remove it, or add the label")
    first: dict[str, str] = {}
    for label, word in verbalizer.items():
        if not word.strip():
            raise ValueError(f"has no word for the label {label!r}: it is white space")
        other = first.setdefault(word.strip(), label)
        if other != label:
            raise ValueError(
                f"has the same word {word.strip()!r} for {other!r} and {label!r}: give different words"
            )
