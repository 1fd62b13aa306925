"""The Triton kernels compile for the chips they are for, without spilling registers and within the chip's shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LINES = {"fp32": 27, "fp16": 35, "bf16": 35}
MORE = {("90", "fp16"): 36, ("90", "bf16"): 36, ("100", "fp16"): 6, ("100", "bf16"): 6}
"""A line for each kernel, rank and block of tokens, and more where blocks are larger or the copy engine fetches them."""


@pytest.mark.parametrize(
    ("chips", "types"),
    [
        (("80", "90"), ("bf16",)),
        (("90",), ("fp32",)),
        pytest.param(("80",), ("fp32",), marks=pytest.mark.full),
        pytest.param(("80", "90"), ("fp16",), marks=pytest.mark.full),
        pytest.param(("100", "120"), ("fp32", "fp16", "bf16"), marks=pytest.mark.full),
    ],
)
def test_every_shipped_configuration_fits(chips: tuple[str, ...], types: tuple[str, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/compile_kernels.py", "--chips", *chips, "--types", *types]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| sm_") == sum(LINES[type_] + MORE.get((chip, type_), 0) for chip in chips for type_ in types)
