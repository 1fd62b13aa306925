"""Adapters on a base that FSDP2 shards over two real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT


@pytest.mark.parametrize(
    "checkpointing", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("off", "reentrant")), "non_reentrant"]
)
def test_a_sharded_base_gives_the_numbers_of_the_plain_one(checkpointing: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "tests/e2e/sharded_base.py", checkpointing],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 agrees" in done.stdout
    assert "process 1 agrees" in done.stdout
