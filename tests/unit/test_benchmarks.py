"""The benchmark scripts import only names that exist; two runs are compared by problem."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import before_after

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.rglob("*.py"))
NEED_LM_EVAL = {"flora_train.evaluation.harness.evaluation", "flora_train.evaluation.harness.model"}
"""Modules that import an optional package."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.relative_to(BENCHMARKS).as_posix())
def test_benchmark_imports_existing_names_of_flora_train(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flora_train"):
            if str(node.module) in NEED_LM_EVAL and find_spec("lm_eval") is None:
                continue
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


def test_two_runs_are_compared_by_problem(tmp_path: Path) -> None:
    settings = {"temperature": 0.2, "top_p": 0.95, "max_new_tokens": 64, "seed": 0}
    passed = {"before": {"p": "OK", "q": "Timeout"}, "after": {"p": "OK", "q": "OK"}}
    for run, statuses in passed.items():
        folder = tmp_path / run / "eval" / "starter"
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(settings))
        rows = []
        for name, status in statuses.items():
            key = {"language": "lua", "name": name, "sample": 0}
            rows.append({"adapter": "lua-lora", **key, "status": status})
            rows.append({"adapter": "base", **key, "status": "SyntaxError"})
        (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    solved = before_after.compared([tmp_path / run / "eval" for run in passed], "starter")
    lines = before_after.table(solved, ("SFT", "DPO"))
    assert "2 problems, 1 samples at temperature 0.2" in "\n".join(lines)
    assert "| Lua | lora | 0.000 | 0.500 | 1.000 | +0.500 [+0.000, +1.000] |" in lines
    assert "| mean of 1 | lora | 0.000 | 0.500 | 1.000 | +0.500 [+0.000, +1.000] |" in lines
    file = tmp_path / "after/eval/starter/settings.json"
    file.write_text(json.dumps({**settings, "temperature": 0.8}))
    with pytest.raises(SystemExit, match=r"starter: temperature is 0\.2 before and 0\.8 after"):
        before_after.compared([tmp_path / run / "eval" for run in passed], "starter")
