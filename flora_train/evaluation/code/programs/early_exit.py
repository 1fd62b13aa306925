"""Finds words that may end a program before its tests, for programs that cannot prove that they ran their
checks.
"""

from __future__ import annotations

import re

from flora_train.evaluation.code.programs.languages import Language


def exits_early(language: Language, completion: str) -> bool:
    """Whether the completion, cut at its stop token, has words outside comments that end a program early.

    This is a search for words, not a parse: a flagged pass should be inspected, and other ways to end a
    program are missed.
    """
    # after code, a comment is recognised only if it contains no quotes, as the sign may be inside a string
    comment = rf"^\s*(?:{language.comment}).*$|\s(?:{language.comment})[^\n\"'`]*$"
    code = re.sub(comment, "", completion, flags=re.MULTILINE)
    return re.search(language.exits, code, re.MULTILINE) is not None
