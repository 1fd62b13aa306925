"""pip finds versions that this package and Flower agree on, without --no-deps."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.flower.deployment import ROOT


def test_pip_resolves_this_package_beside_flower(tmp_path: Path) -> None:
    """In an empty environment, with torch's CPU build. Only what pip needs to know is downloaded."""
    report = tmp_path / "report.json"
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    target = ["--target", str(tmp_path / "target"), "--report", str(report)]
    done = subprocess.run(
        [*command, *target, torch, f"flwr=={version('flwr')}", str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    chosen = {}
    for entry in json.loads(report.read_text())["install"]:
        metadata = entry["metadata"]
        chosen[metadata["name"].lower().replace("_", "-")] = metadata["version"]
    assert {"flwr", "flora-train", "torch", "transformers", "typer", "rich"} <= chosen.keys()
    for line in requires("flwr") or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name = requirement.name.lower().replace("_", "-")
            assert requirement.specifier.contains(chosen[name], prereleases=True), (line, chosen[name])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["init", "--help"]])
def test_the_command_line_works_with_the_versions_that_flower_asks_for(arguments: list[str]) -> None:
    """Its typer, click and rich are older than those of constraints.txt."""
    command = [str(Path(sys.executable).parent / "flora-train"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_nothing_that_is_installed_disagrees() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
