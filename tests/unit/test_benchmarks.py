"""The benchmark scripts import only names that exist."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.relative_to(BENCHMARKS).as_posix())
def test_benchmark_imports_existing_names_of_flora_train(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flora_train"):
            module = import_module(str(node.module))
            for alias in node.names:
                is_module = find_spec(f"{node.module}.{alias.name}") if hasattr(module, "__path__") else None
                if not hasattr(module, alias.name) and is_module is None:
                    missing.append(f"{node.module}.{alias.name}")
    assert missing == []


@pytest.mark.full
def test_the_headline_recipe_runs_on_a_small_model_without_network() -> None:
    script = BENCHMARKS / "headline_gpu.py"
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--tiny", "--steps", "3"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "27 adapters, 13,824 tokens a step, 3 steps" in done.stdout
    (speed,) = [line for line in done.stdout.splitlines() if line.startswith("| tokens/s")]
    assert float(speed.split("|")[2].replace(",", "")) > 0
