"""Builds the texts of recipe=federated_local: diagnoses of ICD-10-CM and the chapter that each belongs to.

    python assets/build_clinical_corpus.py                   first: the diagnoses by block (clinical_local)
    python assets/build_federated_texts.py                   writes assets/federated_local/{train,test}.jsonl
    python assets/build_federated_texts.py --development     writes development.{train,validation}.jsonl, too

A row has the columns `text`, `label` (a chapter, such as ch05) and `block`, the range of categories. Test
texts are of other categories than training texts, as in assets/clinical_local. Chapters have as many texts
each, so that a classifier that knows no text is right for one in twenty-one. The first rows are taken, so
that the same sources give the same bytes.

Development texts are training texts: whole categories of them are held out, by which learning rates are
chosen (studies/federated_rates.py) without a look at the test texts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "assets" / "clinical_local"
OUTPUT = ROOT / "assets" / "federated_local"
SOURCES = {"train": ("n1000", 96), "test": ("test", 32)}
"""File -> ending of its source, and rows of each chapter."""
HELD_OUT = 16
"""Texts of each chapter that are held out for development; there may be fewer where its categories are
large."""
NOTICE = """# Notice

Built on your machine from assets/clinical_local (see NOTICE.md there: ICD-10-CM is in the public domain), and
not shipped.
"""


class TextsError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="diagnoses (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    parser.add_argument("--development", action="store_true", help="write the development texts, too")
    options = parser.parse_args()
    try:
        counts = build(options.corpus, options.output, development=options.development)
    except TextsError as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {', '.join(f'{count} rows of {name}' for name, count in counts.items())}")


def build(corpus: Path, output: Path, *, development: bool = False) -> dict[str, int]:
    """Write the files. development: those of development, too. Returns file -> rows. Raises TextsError for a
    source that is missing or short."""
    chapters = sorted(path.name.split(".")[0] for path in corpus.glob("ch*.test.jsonl"))
    if not chapters:
        raise TextsError(f"{corpus} has no diagnoses: run python assets/build_clinical_corpus.py first")
    files: dict[str, list[str]] = {}
    for chapter in chapters:
        for name, (ending, count) in SOURCES.items():
            rows = read_rows(corpus / f"{chapter}.{ending}.jsonl", count)
            files.setdefault(name, []).extend(lines_of(rows, chapter))
            if development and name == "train":
                for part, own in held_out(rows).items():
                    files.setdefault(f"development.{part}", []).extend(lines_of(own, chapter))
    output.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (output / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    return {name: len(lines) for name, lines in files.items()}


def read_rows(file: Path, count: int) -> list[dict[str, Any]]:
    """The first diagnoses of a chapter. Raises TextsError if there are fewer."""
    try:
        source = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TextsError(f"{file}: {error.strerror}: run python assets/build_clinical_corpus.py") from error
    rows = [json.loads(line) for line in source if line][:count]
    if len(rows) < count:
        raise TextsError(f"{file} has {len(rows)} rows, and {count} are needed")
    return rows


def held_out(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Divide the training rows of a chapter for development.

    Args:
        rows: With the column `group`, the category of a diagnosis.

    Returns:
        `validation`: whole categories, in the order of their hashes, which together have at most HELD_OUT
        rows; `train`: all other rows.
    """
    categories: dict[str, int] = {}
    for row in rows:
        categories[row["group"]] = categories.get(row["group"], 0) + 1
    chosen: set[str] = set()
    room = HELD_OUT
    for category in sorted(categories, key=lambda name: sha256(name.encode()).hexdigest()):
        if categories[category] <= room:
            chosen.add(category)
            room -= categories[category]
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for row in rows:
        part = "validation" if row["group"] in chosen else "train"
        parts[part].append(row)
    return parts


def lines_of(rows: Sequence[dict[str, Any]], chapter: str) -> list[str]:
    """The rows as they are written."""
    lines = []
    for row in rows:
        content = {"text": row["text"], "label": chapter, "block": row["label"]}
        lines.append(json.dumps(content, ensure_ascii=False) + "\n")
    return lines


if __name__ == "__main__":
    main()
