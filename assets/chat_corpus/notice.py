"""NOTICE.md of the dialogues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .dialogues import (
    ALTERNATIVES,
    EXCHANGES,
    HELD_OUT_PERCENT,
    LONGEST_TURN,
    MOST_TURNS,
    SHARED_ANSWER,
)
from .sources import DIALOGUES, LEFT_OUT

LICENCE = "LICENSE.chatterbot-corpus"

_TEXT = """# Origin and licence of the dialogues

Written by `assets/build_chat_corpus.py`; do not edit. Every turn is from the PyPI package
`chatterbot-corpus` {version} (https://github.com/gunthercox/chatterbot-corpus), Copyright (c) 2017, Gunther
Cox, under the BSD licence with three clauses ([full text]({licence})). Its texts were written by many
volunteers; they have mistakes, and nobody should take its answers as facts.

Changes:

- Eight of its languages, without the topics {left_out}.
- White space was joined; entries that are not texts, have an empty turn, a turn of more than {longest}
  characters, or only repeat the question were left out.
- In the topics {dialogues} an entry is a dialogue; turns after number {turns} and a last turn without an
  answer were cut off. In all others an entry is a question and alternative answers, of which the first
  {alternatives} are used.
- Up to {exchanges} exchanges of one topic, in the order of the package, were joined to one dialogue: most
  dialogues of several turns come from this, and their turns do not refer to each other.
- About {percent} % are held out. No question and no answer of at least {shared} characters is in both splits
  of a language. The same dialogue may be in several languages, as the package was translated.

| language | training dialogues (answers) | held-out dialogues (answers) |
|---|---|---|
{rows}
"""


def write_notice(output: Path, version: str, counts: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """Write NOTICE.md. counts: language -> split -> numbers of dialogues and of answers."""
    rows = []
    for language, sizes in counts.items():
        cells = (f"{dialogues} ({answers})" for dialogues, answers in sizes.values())
        rows.append(f"| {language} | {' | '.join(cells)} |")
    text = _TEXT.format(
        version=version,
        left_out=", ".join(LEFT_OUT),
        dialogues=", ".join(DIALOGUES),
        percent=HELD_OUT_PERCENT,
        licence=LICENCE,
        longest=LONGEST_TURN,
        turns=MOST_TURNS,
        alternatives=ALTERNATIVES,
        exchanges=EXCHANGES,
        shared=SHARED_ANSWER,
        rows="\n".join(rows),
    )
    (output / "NOTICE.md").write_text(text, encoding="utf-8")
