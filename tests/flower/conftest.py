"""Labelled texts, an encoder, and three clients. Tests of this folder need Flower: the mark `flower`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from flora_train.runtime.logging import stop_logging
from tests.encoders import labelled_rows, save_encoder, write_rows
from tests.flower.clock import Clock
from tests.flower.deployment import Deployment, deployment

HAS_FLOWER = find_spec("flwr") is not None
collect_ignore = [] if HAS_FLOWER else ["test_nodes.py", "test_remote_rounds.py"]
"""Files that import Flower, which cannot even be read without it. The others say that it is missing."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "flower":
            item.add_marker("flower")


@pytest.fixture(autouse=True, scope="session")
def _installed() -> None:
    if not HAS_FLOWER:
        pytest.fail("flwr is not installed: run make test-flower")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder and labelled texts."""
    folder = tmp_path_factory.mktemp("material")
    save_encoder(folder / "bert")
    write_rows(folder / "train.jsonl", labelled_rows(40, seed=1))
    write_rows(folder / "test.jsonl", labelled_rows(12, seed=2))
    return folder


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink and three SuperNodes, for the runs of a module."""
    folder = tmp_path_factory.mktemp("deployment")
    with deployment(folder, ["client_0", "client_1", "client_2"]) as own:
        yield own


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of `Nodes`, in a process with the numbers that Flower gives, whose log is captured."""
    from flwr.supercore.task_identity import TaskIdentity

    from flora_train.federated.flower import nodes

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    own = Clock()
    monkeypatch.setattr(nodes, "time", own)
    stop_logging()
    return own
