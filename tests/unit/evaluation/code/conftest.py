"""Fixtures: the sandbox of this machine, if it works, and languages whose toolchain is installed."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from pathlib import Path

import pytest

from flora_train.evaluation.code.programs.execute import preflight
from flora_train.evaluation.code.programs.languages import Language, load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox, open_sandbox
from flora_train.runtime.atomic import write_atomically

answers: list[Path] = []
"""The folder in which the worker processes of a test run share what they found out about toolchains."""


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: eval/install_toolchains.sh")
    of_worker = tmp_path_factory.getbasetemp()
    of_run = of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker
    answers[:] = [of_run / "toolchains"]
    answers[0].mkdir(exist_ok=True)
    return open_sandbox("bubblewrap")


@lru_cache(maxsize=64)
def why_not(key: str, sandbox: Sandbox) -> str | None:
    """Why the language does not work here, with the line that installs it."""
    answer = answers[0] / key
    if not answer.exists():
        reason = preflight([load_languages()[key]], sandbox).get(key, "")
        write_atomically(answer, lambda path: path.write_text(reason))
    return answer.read_text() or None


def working(key: str, sandbox: Sandbox) -> Language:
    """Skips the test, and says why, where the toolchain is missing."""
    if reason := why_not(key, sandbox):
        pytest.skip(reason)
    return load_languages()[key]
