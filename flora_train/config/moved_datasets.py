"""Data sets whose contents are not on the hub (any more), and how to get them instead."""

from __future__ import annotations

import re

from flora_train.config.paths import IS_CHECKOUT, PROJECT_ROOT

COMMON_VOICE = re.compile(r"mozilla-foundation/common_voice\w*", re.IGNORECASE)
"""Former repositories of Common Voice. Since October 2025 the Mozilla Data Collective distributes it."""
STACK_V2 = re.compile(r"bigcode/the-stack-v2[\w-]*", re.IGNORECASE)
"""Repositories that hold identifiers of files, and no contents."""


def moved_hint(name: str) -> str | None:
    """Where the contents of a data set are, if the hub is known not to have them; else None."""
    if COMMON_VOICE.fullmatch(name):
        return (
            "is no longer on the hub: the Mozilla Data Collective distributes Common Voice. With an account "
            "there, accept the terms of a language, download its .tar.gz, and give common_voice (the file) "
            "and locale (cs) in place of hub (docs/speech.md)"
        )
    if STACK_V2.fullmatch(name):
        download = f"{stack_v2_script()} --data-set {name} --language LANGUAGE --rows 20000 --out FILE.jsonl"
        return (
            "holds identifiers of files, without their code: accept its terms (bulk downloads need an "
            f"agreement with Software Heritage), run `{download}`, and give FILE.jsonl in place of this "
            "source (docs/data.md)"
        )
    return None


def stack_v2_script() -> str:
    """The command that downloads code of The Stack v2, without its options."""
    path = "assets/download_stack_v2.py"
    if not IS_CHECKOUT:
        path = str(PROJECT_ROOT / path)
    return f"python {path}"
