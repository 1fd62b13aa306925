"""Diagnoses of ICD-10-CM, read from the tabular list of the US National Center for Health Statistics.

The list is a tree: chapters, blocks (sections), categories of three characters, and codes below them. Its
entries are codes without the variants that a seventh character makes.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .example import Example, words_of

LEAST_ENTRIES = 20
"""Entries that a block must have to be a label."""
LEAST_CATEGORIES = 2
"""Categories that a block must have to be a label: one for training and one for the test at least."""
LEAST_BLOCKS = 2
"""Labels that a chapter must have to be a task."""

_COMMON = """
    a an and as by certain classified due elsewhere for from in its nos not of on or other specified the to
    unspecified with
"""
COMMON = frozenset(_COMMON.split())
"""Words of a block's title that name nothing."""


@dataclass
class Chapter:
    """A chapter with the entries of the blocks that are its labels."""

    number: int
    title: str
    examples: list[Example] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    """Block -> its title, of the blocks that are labels."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason -> number of entries."""

    @property
    def is_task(self) -> bool:
        return len(self.titles) >= LEAST_BLOCKS


@dataclass(frozen=True)
class _Block:
    name: str
    title: str
    entries: list[Example]


def read_chapters(tabular: bytes) -> list[Chapter]:
    """The chapters of the tabular list (XML), with those that are no task."""
    chapters = []
    for element in ElementTree.fromstring(tabular).iterfind("chapter"):
        blocks = [_read_block(section) for section in element.iterfind("section")]
        chapters.append(_make_chapter(int(_text(element, "name")), _title(element), blocks))
    return chapters


def names_block(text: str, title: str) -> bool:
    """Whether a text has all words of a block's title, in any order, that name something."""
    naming = set(words_of(title)) - COMMON
    return naming <= set(words_of(text))


def _make_chapter(number: int, title: str, blocks: list[_Block]) -> Chapter:
    chapter = Chapter(number, title)
    labels_of: dict[str, set[str]] = {}
    for block in blocks:
        for entry in block.entries:
            labels_of.setdefault(_same(entry), set()).add(block.name)
    for block in blocks:
        usable = _usable(block, labels_of, chapter.left_out)
        if not usable:
            continue
        if len(usable) < LEAST_ENTRIES:
            chapter.left_out["in small blocks"] += len(usable)
        elif len({entry.group for entry in usable}) < LEAST_CATEGORIES:
            chapter.left_out["in blocks of one category"] += len(usable)
        else:
            chapter.examples += usable
            chapter.titles[block.name] = block.title
    return chapter


def _usable(block: _Block, labels_of: dict[str, set[str]], left_out: Counter[str]) -> list[Example]:
    """The entries that do not name their block, the first of those with the same text."""
    usable: dict[str, Example] = {}
    for entry in block.entries:
        same = _same(entry)
        if names_block(entry.text, block.title):
            left_out["names its block"] += 1
        elif len(labels_of[same]) > 1:
            left_out["in two blocks"] += 1
        elif same in usable:
            left_out["repeated"] += 1
        else:
            usable[same] = entry
    return list(usable.values())


def _same(entry: Example) -> str:
    """What entries with the same text share."""
    return " ".join(words_of(entry.text))


def _read_block(section: ElementTree.Element) -> _Block:
    name = section.get("id", "").strip()
    entries = []
    for category in section.iterfind("diag"):
        group = _text(category, "name")
        for entry in _diagnoses(category):
            text = " ".join(_text(entry, "desc").split())
            entries.append(Example(text, name, group, _text(entry, "name")))
    return _Block(name, _title(section), entries)


def _diagnoses(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """A category and all codes below it."""
    return element.iter("diag")


def _title(element: ElementTree.Element) -> str:
    """The description of a chapter or block without the codes at its end."""
    return re.sub(r"\s*\([A-Z0-9 -]+\)\s*$", "", _text(element, "desc"))


def _text(element: ElementTree.Element, name: str) -> str:
    text = element.findtext(name)
    if not text:
        raise ValueError(f"an element {element.tag!r} of the tabular list has no {name!r}")
    return text.strip()
