"""Evidence that a passing program ran its checks: a second run of it must print a nonce after the last check, and then fail one.

The program that decides the verdict is never changed. In the second one, the key `evidence` of its language's row puts two things
behind the last check: the nonce, which a program that ended before does not print, and a check that cannot hold, which a program
whose checks were made to do nothing survives.
"""

from __future__ import annotations

import re
import secrets

from flora_train.evaluation.code.programs.languages import Language

NONCE_BYTES = 16


def draw_nonce() -> str:
    """Of 32 letters and digits, for one run of one program."""
    return secrets.token_hex(NONCE_BYTES)


def with_evidence(language: Language, source: str, tests: str, nonce: str) -> str | None:
    """`source`, which ends with `tests`, with the evidence in it; None where the language has none, or these tests have no place
    for it."""
    evidence = language.evidence
    if evidence is None or not source.endswith(tests):
        return None
    places = list(re.finditer(evidence.before, tests, re.MULTILINE))
    if not places:
        return None
    at = len(source) - len(tests) + places[-1].start()
    return source[:at] + evidence.write.replace("{nonce}", nonce) + source[at:]
