"""The Triton kernels compile for the chips they are for, without spilling registers and within the chip's
shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LINES = {"fp32": 33, "fp16": 41, "bf16": 41}
MORE = {("90", "fp16"): 36, ("90", "bf16"): 36, ("100", "fp16"): 6, ("100", "bf16"): 6}
"""A line for each kernel, rank and block of tokens, and more where blocks are larger or the copy engine
fetches them."""
LINES_OF_RANK_64 = {"80": 13, "90": 26}
"""In half precision."""


def test_the_largest_rank_fits() -> None:
    """Rank 64 needs the most registers and shared memory."""
    table = compiled("--chips", "80", "90", "--types", "bf16", "--ranks", "64")
    assert {chip: table.count(f"| sm_{chip} |") for chip in LINES_OF_RANK_64} == LINES_OF_RANK_64


@pytest.mark.full
@pytest.mark.parametrize(
    ("chips", "types"),
    [
        (("80", "90"), ("bf16", "fp16")),
        pytest.param(("80", "90"), ("fp32",), marks=pytest.mark.chips),
        pytest.param(("100", "120"), ("fp32", "fp16", "bf16"), marks=pytest.mark.chips),
    ],
)
def test_every_shipped_configuration_fits(chips: tuple[str, ...], types: tuple[str, ...]) -> None:
    table = compiled("--chips", *chips, "--types", *types)
    assert table.count("| sm_") == sum(
        LINES[type_] + MORE.get((chip, type_), 0) for chip in chips for type_ in types
    )


def compiled(*options: str) -> str:
    """The table that benchmarks/compile_kernels.py prints; it fails where a configuration does not fit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, "benchmarks/compile_kernels.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
