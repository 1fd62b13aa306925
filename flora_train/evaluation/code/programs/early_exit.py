"""Words that may end a program before its tests: the flag where a program cannot give evidence of its checks (evidence.py)."""

from __future__ import annotations

import re

from flora_train.evaluation.code.programs.languages import Language


def exits_early(language: Language, completion: str) -> bool:
    """Whether the completion has words that end a program of this language early, outside comments. It reads words and knows no
    grammar: a passing program that is flagged deserves a look, and what ends a program by other means goes unseen.

    completion: as it stands in the program, cut at its stop token.
    """
    # behind code, only what holds no quote is surely a comment and no text
    comment = rf"^\s*(?:{language.comment}).*$|\s(?:{language.comment})[^\n\"'`]*$"
    code = re.sub(comment, "", completion, flags=re.MULTILINE)
    return re.search(language.exits, code, re.MULTILINE) is not None
