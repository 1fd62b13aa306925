"""Tests of this folder need the environment of TRL and are marked `trl`."""

from __future__ import annotations

import pytest

from tests.trl.environment import trl_python


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "trl":
            item.add_marker("trl")


@pytest.fixture(autouse=True)
def _environment() -> None:
    if not trl_python().exists():
        pytest.fail(f"there is no {trl_python()}: run make trl-env")
