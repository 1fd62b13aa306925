"""The sandbox, where this machine has one, and languages whose toolchain works here."""

from __future__ import annotations

import shutil
from functools import lru_cache

import pytest

from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import Language, load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox, open_sandbox


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: eval/install_toolchains.sh")
    return open_sandbox("bubblewrap")


@lru_cache(maxsize=64)
def why_not(key: str, sandbox: Sandbox) -> str | None:
    """Why the language does not work here, with the line that installs it."""
    return preflight([load_languages()[key]], sandbox).get(key)


def working(key: str, sandbox: Sandbox) -> Language:
    """Skips the test, and says why, where the toolchain is missing."""
    if reason := why_not(key, sandbox):
        pytest.skip(reason)
    return load_languages()[key]
