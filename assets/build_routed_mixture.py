"""Builds the texts of recipe=routed_local: short pieces of three programming and six natural languages.

    python assets/build_many_languages.py      first: the Universal Declaration of Human Rights (udhr_local)
    python assets/build_routed_mixture.py      writes assets/routed_local/<language>.{train,validation}.jsonl

A row has the columns `text`, `language` and `member`: the adapter of recipe=routed_members_local for its
language, such as lua-lora. Code is the shipped functions of assets/code that are short
enough to be read whole; their held-out functions come from other packages. A held-out paragraph is one of an
article that no row is trained on. The first rows are taken, so that the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE, PARAGRAPHS = ROOT / "assets" / "code", ROOT / "assets" / "udhr_local"
OUTPUT = ROOT / "assets" / "routed_local"
PROGRAMMING = ("lua", "perl", "ruby")
NATURAL = ("ces", "cym", "fin", "hun", "ind", "ita")
"""Czech, Welsh, Finnish, Hungarian, Indonesian and Italian."""
LENGTHS = range(80, 361)
"""Characters of a function."""
ROWS = {"train": 48, "validation": 16}
"""Split -> rows of a programming language."""
PARAGRAPH_ROWS = {"train": 48, "validation": 8}
"""Split -> rows of a natural language."""
NOTICE = """# Notice

Built on your machine from assets/code (licences in assets/code/NOTICE.md; each row has its own) and
assets/udhr_local (see assets/udhr_local/NOTICE.md), and not shipped.
"""


class MixtureError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--code", type=Path, default=CODE, help="functions (default: %(default)s)")
    parser.add_argument("--paragraphs", type=Path, default=PARAGRAPHS, help="text (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args()
    try:
        counts = build(options.code, options.paragraphs, options.output)
    except MixtureError as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {', '.join(f'{rows} rows of {name}' for name, rows in counts.items())}")


def build(code: Path, paragraphs: Path, output: Path) -> dict[str, int]:
    """Write all files. Returns split -> rows. Raises MixtureError for a source that is missing or short."""
    counts = dict.fromkeys(ROWS, 0)
    files: dict[str, list[dict[str, str]]] = {}
    for split in ROWS:
        for language in PROGRAMMING:
            rows = taken(functions(code / f"{language}.{split}.jsonl"), ROWS[split], language)
            files[f"{language}.{split}.jsonl"] = [labelled(row, language) for row in rows]
        for language in NATURAL:
            source = read(paragraphs / f"{language}.{split}.jsonl")
            rows = taken(source, PARAGRAPH_ROWS[split], language)
            files[f"{language}.{split}.jsonl"] = [labelled(row, language) for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        counts[name.split(".")[1]] += len(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (output / name).write_text("".join(lines), encoding="utf-8")
    (output / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    return counts


def functions(file: Path) -> Iterator[dict[str, str]]:
    """The functions of a file of assets/code that have one of LENGTHS, each as one text."""
    for row in read(file):
        text = row.get("prompt", "") + row.get("completion", "")
        if row.get("kind") == "function" and len(text) in LENGTHS:
            yield {"text": text, "license": row["license"], "package": row["package"]}


def labelled(row: dict[str, str], language: str) -> dict[str, str]:
    """A row with its language, and the name of the adapter that is trained on it."""
    return {**row, "language": language, "member": f"{language}-lora"}


def read(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a file. Raises MixtureError if there is none."""
    if not file.exists():
        hint = "python assets/build_many_languages.py builds the paragraphs, and assets/code is shipped"
        raise MixtureError(f"{file}: no such file; {hint}")
    for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
        yield json.loads(line)


def taken(rows: Iterable[dict[str, str]], count: int, language: str) -> list[dict[str, str]]:
    """The first rows. Raises MixtureError if there are fewer."""
    first = list(islice(rows, count))
    if len(first) < count:
        raise MixtureError(f"{language} has {len(first)} rows that are short enough, and {count} are needed")
    return first


if __name__ == "__main__":
    main()
