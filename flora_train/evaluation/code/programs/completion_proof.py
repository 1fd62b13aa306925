"""Proof that a passing program ran its checks: a second run must print a nonce after the last check, then
fail one more.

The program that decides the verdict is never changed. In the second one, the key `evidence` of its language
inserts two things after the last check: the nonce, which a program that ended early does not print, and a
check that fails, which a program that disabled its checks passes.
"""

from __future__ import annotations

import re
import secrets

from flora_train.evaluation.code.programs.languages import Language

NONCE_BYTES = 16


def draw_nonce() -> str:
    """32 hexadecimal digits, for one run of one program."""
    return secrets.token_hex(NONCE_BYTES)


def with_evidence(language: Language, source: str, *, tests: str, nonce: str) -> str | None:
    """`source`, which ends with `tests`, with nonce and failing check inserted.

    None if the language has no `evidence`, or its pattern does not match these tests.
    """
    evidence = language.evidence
    if evidence is None or not source.endswith(tests):
        return None
    matches = list(re.finditer(evidence.before, tests, re.MULTILINE))
    if not matches:
        return None
    position = len(source) - len(tests) + matches[-1].start()
    return source[:position] + evidence.write.replace("{nonce}", nonce) + source[position:]
