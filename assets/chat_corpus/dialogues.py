"""Entries of chatterbot-corpus as dialogues, and their division into training and held-out ones."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from .sources import DIALOGUES

LONGEST_TURN = 400
"""Characters of a turn."""
MOST_TURNS = 12
"""Turns of a dialogue; later ones are cut off."""
ALTERNATIVES = 3
"""Answers of one question that are used."""
EXCHANGES = 3
"""Questions with answers that are joined to one dialogue."""
HELD_OUT_PERCENT = 20
SHARED_ANSWER = 16
"""Characters from which two equal answers put their entries into the same split; shorter ones are such as
"Yes."."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Dialogue:
    """Turns of user and assistant, who alternate; the assistant has the last one."""

    topic: str
    turns: tuple[str, ...]

    def messages(self) -> list[dict[str, str]]:
        """In OpenAI's layout."""
        roles = ("user", "assistant")
        return [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(self.turns)]


@dataclass(frozen=True)
class Topic:
    """The entries of one file."""

    units: list[Dialogue]
    """Whole dialogues, and single exchanges that may be joined to longer ones."""
    dropped: int


def read_topic(topic: str, text: str) -> Topic:
    """The entries of a file: dialogues, or a question with each of its first answers."""
    units: list[Dialogue] = []
    dropped = 0
    for entry in yaml.safe_load(text).get("conversations", []):
        if not isinstance(entry, list) or not all(isinstance(turn, str) for turn in entry):
            dropped += 1
            continue
        turns = [" ".join(turn.split()) for turn in entry]
        candidates = _entry_dialogues(topic, turns)
        usable = [dialogue for dialogue in candidates if _is_usable(dialogue)]
        units += usable
        dropped += not usable
    return Topic(list(dict.fromkeys(units)), dropped)


def _entry_dialogues(topic: str, turns: Sequence[str]) -> list[Dialogue]:
    if topic in DIALOGUES:
        turns = turns[:MOST_TURNS]
        return [Dialogue(topic, tuple(turns[: len(turns) // 2 * 2]))]
    return [Dialogue(topic, (turns[0], answer)) for answer in turns[1 : 1 + ALTERNATIVES]]


def _is_usable(dialogue: Dialogue) -> bool:
    if len(dialogue.turns) < 2 or max(map(len, dialogue.turns)) > LONGEST_TURN:
        return False
    plain = [normalised(turn) for turn in dialogue.turns]
    # an answer that repeats its question is an error of the corpus, except in greetings
    repeats = dialogue.topic not in DIALOGUES and plain[0] == plain[1]
    return all(plain) and not repeats


def normalised(text: str) -> str:
    """The words of a text in lower case."""
    return " ".join(_WORD.findall(text.lower()))


def split_dialogues(units: Sequence[Dialogue]) -> dict[str, list[Dialogue]]:
    """Split -> dialogues; no question and no longer answer is in both splits."""
    splits: dict[str, list[Dialogue]] = {"train": [], "validation": []}
    for group in connected(units):
        splits[_split_of(group)] += group
    order = {dialogue: number for number, dialogue in enumerate(units)}
    joined = {}
    for split, dialogues in splits.items():
        joined[split] = join_exchanges(sorted(dialogues, key=order.__getitem__))
    return joined


def _split_of(group: Sequence[Dialogue]) -> str:
    """By a hash of the group's first question, so that a longer corpus leaves other groups where they are."""
    key = normalised(group[0].turns[0])
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return "validation" if number % 100 < HELD_OUT_PERCENT else "train"


def connected(units: Sequence[Dialogue]) -> list[list[Dialogue]]:
    """The units in groups of those that share a question or a longer answer, directly or through others."""
    by_text: defaultdict[str, list[int]] = defaultdict(list)
    for number, unit in enumerate(units):
        for text in shared_texts(unit):
            by_text[text].append(number)
    parent = list(range(len(units)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for numbers in by_text.values():
        for other in numbers[1:]:
            first, second = sorted((root(numbers[0]), root(other)))
            parent[second] = first
    groups: defaultdict[int, list[Dialogue]] = defaultdict(list)
    for number, unit in enumerate(units):
        groups[root(number)].append(unit)
    return list(groups.values())


def shared_texts(unit: Dialogue) -> set[str]:
    """What may be in one split only: every question, and every answer of some length."""
    questions = {normalised(turn) for turn in unit.turns[::2]}
    answers = {normalised(turn) for turn in unit.turns[1::2]}
    return questions | {answer for answer in answers if len(answer) >= SHARED_ANSWER}


def join_exchanges(units: Iterable[Dialogue]) -> list[Dialogue]:
    """Dialogues as they are; exchanges of one topic joined to dialogues of up to `EXCHANGES` questions.

    Two answers to one question are never in the same dialogue."""
    finished: list[Dialogue] = []
    opened: defaultdict[str, list[list[str]]] = defaultdict(list)
    for unit in units:
        if len(unit.turns) > 2:
            finished.append(unit)
            continue
        question = normalised(unit.turns[0])
        for turns in opened[unit.topic]:
            asked = {normalised(turn) for turn in turns[::2]}
            if len(turns) < 2 * EXCHANGES and question not in asked:
                turns += unit.turns
                break
        else:
            opened[unit.topic].append(list(unit.turns))
    for topic, dialogues in opened.items():
        finished += [Dialogue(topic, tuple(turns)) for turns in dialogues]
    return finished
