"""Builds what `recipe=multipl_e` asks of the hub, tiny, in a folder that tests/hub_server serves.

    python tests/headline/build_code.py OUT                   the short form: 150 KB of code per language
    python tests/headline/build_code.py OUT --full            more rows than the recipe's max_rows
    MULTIPL_E=FOLDER python tests/headline/build_code.py OUT  with MultiPL-E's prompt files

OUT/models/bigcode/starcoder is a GPT-BigCode of 2 layers with random weights and a tokenizer trained on the
code; OUT/datasets/bigcode/the-stack-dedup has real code of the recipe's nine languages and a few short
programs in the others; OUT/datasets/nuprl/MultiPL-E has the problems. OUT/contents.json says where all of it
came from, and what could not be had here. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.headline.code_sources import SOURCES, SourceFile, collect, solutions  # noqa: E402
from tests.headline.hub_problems import write_problems  # noqa: E402
from tests.headline.stack_files import odd_files, write_language  # noqa: E402
from tests.headline.tiny_starcoder import write_starcoder  # noqa: E402

LARGE = ("d", "lua", "swift")
"""Languages with a file of more than 1 MB."""
CARD = """---
license: other
task_categories:
- text-generation
extra_gated_prompt: Terms of use
---

Code for tests of flora_train, in the layout of the data set of this name.
"""


@dataclass(frozen=True)
class Size:
    """How much code a form has."""

    rows: int
    """Rows of a language at most."""
    characters: int
    """Characters of a language at most, without its odd and large files."""
    lines: int | None
    """Longer files are cut into pieces of so many lines; None: they are left out if they are long."""
    row_group: int
    """Rows of a row group."""


SHORT = Size(rows=120, characters=150_000, lines=None, row_group=12)
FULL = Size(rows=21_000, characters=20_000_000, lines=24, row_group=1000)
LONGEST = 12_000
"""Characters of a file in the short form."""
SHORTEST = 80
"""Characters of a file or a piece of one."""


def build(out: Path, size: Size, prompts: Path | None) -> dict[str, Any]:
    """Write all repositories. Returns what is in them, as in contents.json."""
    downloads = out / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    stack = out / "datasets" / "bigcode" / "the-stack-dedup"
    contents: dict[str, Any] = {"languages": {}}
    texts: list[str] = []
    for task, language, folder in recipe_languages():
        files, reasons = language_files(task, language, downloads, size=size)
        real = [file.repository for file in files]
        files += odd_files(files, large=task in LARGE)
        extension = yaml.safe_load((ROOT / "eval" / "languages.yaml").read_text())[language]["file"]
        write_language(
            stack / folder,
            files,
            extension=extension.rpartition(".")[2],
            language=task,
            row_group=size.row_group,
        )
        contents["languages"][task] = {
            "rows": len(files),
            "sources": sorted(set(real)),
            "not used": reasons,
        }
        texts += [file.text for file in files[:200] if len(file.text) < 100_000]
    (stack / "README.md").write_text(CARD, encoding="utf-8")
    contents["problems"] = write_problems(out / "datasets" / "nuprl" / "MultiPL-E", prompts)
    write_starcoder(out / "models" / "bigcode" / "starcoder", texts)
    (out / "contents.json").write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    return contents


def recipe_languages() -> list[tuple[str, str, str]]:
    """Task, language and folder of all tasks of data_configs/multipl_e.yaml."""
    tasks = yaml.safe_load((ROOT / "data_configs" / "multipl_e.yaml").read_text(encoding="utf-8"))["tasks"]
    return [(name, task["language"], task["train"]["data_dir"]) for name, task in tasks.items()]


def language_files(
    task: str, language: str, downloads: Path, *, size: Size
) -> tuple[list[SourceFile], list[str]]:
    """The files of a task, and why some sources are not used here."""
    files, reasons = collect(task, downloads) if task in SOURCES else ([], [])
    if not files:
        return solutions(language), reasons
    if size.lines is None:
        files = [file for file in files if SHORTEST < len(file.text) < LONGEST]
    else:
        files = [piece for file in files for piece in pieces(file, size.lines)]
    return chosen(files, size), reasons


def pieces(file: SourceFile, lines: int) -> list[SourceFile]:
    """A file in parts of so many lines."""
    all_lines = file.text.splitlines(keepends=True)
    parts = []
    for begin in range(0, len(all_lines), lines):
        text = "".join(all_lines[begin : begin + lines])
        if len(text) > SHORTEST:
            parts.append(SourceFile(file.repository, f"{file.path}#{begin}", file.license, text))
    return parts


def chosen(files: Sequence[SourceFile], size: Size) -> list[SourceFile]:
    """A part of the files, in an order that has nothing to do with their names."""

    def key(file: SourceFile) -> str:
        return hashlib.sha256(f"{file.path}\n{file.text}".encode()).hexdigest()

    members: list[SourceFile] = []
    characters = 0
    for file in sorted(files, key=key):
        if len(members) == size.rows or characters > size.characters:
            break
        members.append(file)
        characters += len(file.text)
    return members


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true", help="more rows than recipe=multipl_e reads")
    options = parser.parse_args()
    size = FULL if options.full else SHORT
    prompts = os.environ.get("MULTIPL_E")
    contents = build(options.out, size, Path(prompts) if prompts else None)
    for task, facts in contents["languages"].items():
        notes = "; ".join(facts["not used"])
        print(f"{task}: {facts['rows']} rows of {', '.join(facts['sources'])} {notes}".rstrip())


if __name__ == "__main__":
    main()
