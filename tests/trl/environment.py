"""Runs a script in the environment that has TRL, and returns what the script wrote."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.paths import PROJECT_ROOT

SCRIPTS = Path(__file__).parent / "scripts"
TIMEOUT = 600
"""Seconds that a script may take."""


def trl_python() -> Path:
    """The interpreter of the environment; FLORA_TRL_PYTHON names another."""
    return Path(os.environ.get("FLORA_TRL_PYTHON") or PROJECT_ROOT / ".venv-trl" / "bin" / "python")


def run_script(name: str, folder: Path, **arguments: Any) -> tuple[Any, dict[str, NDArray[Any]]]:
    """(JSON, arrays) that tests/trl/scripts/`name` wrote.

    The script is called with the path of a JSON file of `arguments`, which also holds "json" and "arrays",
    the paths that it may write to (.json and .npz). A result that it did not write is None, or no arrays.
    """
    request, result, arrays = folder / "request.json", folder / "result.json", folder / "result.npz"
    request.write_text(json.dumps({**arguments, "json": str(result), "arrays": str(arrays)}))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_DISABLED": "true",
    }
    done = subprocess.run(
        [str(trl_python()), str(SCRIPTS / name), str(request)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    content = json.loads(result.read_text()) if result.exists() else None
    if not arrays.exists():
        return content, {}
    with np.load(arrays) as file:
        return content, dict(file)
