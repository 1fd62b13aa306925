"""Builds the texts of recipe=federated_local: diagnoses of ICD-10-CM and the chapter that each belongs to.

    python assets/build_clinical_corpus.py     first: the diagnoses by block (clinical_local)
    python assets/build_federated_texts.py     writes assets/federated_local/{train,test}.jsonl

A row has the columns `text`, `label` (a chapter, such as ch05) and `block`, the range of categories. Test
texts are of other categories than training texts, as in assets/clinical_local. Chapters have as many texts
each, so that a classifier that knows no text is right for one in twenty-one. The first rows are taken, so
that the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "assets" / "clinical_local"
OUTPUT = ROOT / "assets" / "federated_local"
SOURCES = {"train": ("n1000", 96), "test": ("test", 32)}
"""File -> ending of its source, and rows of each chapter."""
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
    options = parser.parse_args()
    try:
        counts = build(options.corpus, options.output)
    except TextsError as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {', '.join(f'{count} rows of {name}' for name, count in counts.items())}")


def build(corpus: Path, output: Path) -> dict[str, int]:
    """Write both files. Returns file -> rows. Raises TextsError for a source that is missing or short."""
    chapters = sorted(path.name.split(".")[0] for path in corpus.glob("ch*.test.jsonl"))
    if not chapters:
        raise TextsError(f"{corpus} has no diagnoses: run python assets/build_clinical_corpus.py first")
    output.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, (ending, rows) in SOURCES.items():
        lines = []
        for chapter in chapters:
            lines += rows_of(corpus / f"{chapter}.{ending}.jsonl", chapter, rows)
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(lines)
    (output / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    return counts


def rows_of(file: Path, chapter: str, count: int) -> list[str]:
    """The first diagnoses of a chapter, as lines. Raises TextsError if there are fewer."""
    try:
        source = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise TextsError(f"{file}: {error.strerror}: run python assets/build_clinical_corpus.py") from error
    rows = [json.loads(line) for line in source if line][:count]
    if len(rows) < count:
        raise TextsError(f"{file} has {len(rows)} rows, and {count} are needed")
    lines = []
    for row in rows:
        content = {"text": row["text"], "label": chapter, "block": row["label"]}
        lines.append(json.dumps(content, ensure_ascii=False) + "\n")
    return lines


if __name__ == "__main__":
    main()
