"""The Triton kernels compile for the chips they are for, without spilling registers and within the chip's shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LINES = 103
"""A line for each kernel, type, rank and block, on one chip."""


@pytest.mark.parametrize("chips", [("80", "90"), pytest.param(("100", "120"), marks=pytest.mark.slow)])
def test_every_shipped_configuration_fits(chips: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/compile_kernels.py", "--chips", *chips]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| sm_") == LINES * len(chips)
