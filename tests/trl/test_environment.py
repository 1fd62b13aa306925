"""The environment of TRL: the version that the comparisons are written for, beside our packages."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from tests.trl.environment import run_script


def test_trl_runs_beside_the_same_packages(tmp_path: Path) -> None:
    versions, _ = run_script("versions.py", tmp_path)
    assert versions["trl"] == "1.16.0"
    assert versions["transformers"] == version("transformers")
    assert versions["peft"] == version("peft")
    assert versions["torch"].split("+")[0] == version("torch").split("+")[0]
