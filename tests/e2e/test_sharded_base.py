"""Adapters on a base that FSDP2 shards over two real processes."""

from __future__ import annotations

import os

import pytest

from tests.forked import python


@pytest.mark.parametrize(
    "checkpointing",
    [*(pytest.param(kind, marks=pytest.mark.full) for kind in ("off", "reentrant")), "non_reentrant"],
)
def test_a_sharded_base_gives_the_numbers_of_the_plain_one(checkpointing: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "tests.e2e.sharded_base", checkpointing, environment=environment, processes=2)
    assert done.returncode == 0, done.stderr
    assert "process 0 agrees" in done.stdout
    assert "process 1 agrees" in done.stdout
