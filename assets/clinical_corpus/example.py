"""A labelled text, and an order of texts that depends on a seed alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")

SIDES = frozenset({"right", "left", "bilateral", "unspecified", "initial", "subsequent", "sequela"})
"""Words that tell a diagnosis from its variants."""


@dataclass(frozen=True)
class Example:
    """A text with its true label."""

    text: str
    label: str
    group: str
    """Texts of one group are variants of each other: all of them are in the same split."""
    source: str
    """Where the text is in its source: a code, or the name of a file."""

    def row(self) -> dict[str, str]:
        """The example as it is written to a file."""
        return {"text": self.text, "label": self.label, "group": self.group, "source": self.source}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without endings of the plural."""
    return [singular(word) for word in re.findall(r"[^\W_]+", text.lower())]


def singular(word: str) -> str:
    """The word without an ending of the English plural; a rough rule that treats all texts alike."""
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def variant_key(text: str) -> str:
    """What a text shares with texts that differ in side, encounter or number only."""
    return " ".join(word for word in words_of(text) if word not in SIDES and not word.isdigit())


def shuffled(items: Iterable[Item], seed: str, name_of: Callable[[Item], str]) -> list[Item]:
    """The items in an order that depends on the seed and their names only."""

    def rank(item: Item) -> tuple[str, str]:
        name = name_of(item)
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest(), name

    return sorted(items, key=rank)
