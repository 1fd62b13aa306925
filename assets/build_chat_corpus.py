"""Builds `assets/chat/<language>.{train,validation}.jsonl`: short dialogues in eight languages.

    python assets/build_chat_corpus.py

The source is the PyPI package chatterbot-corpus (BSD-3-Clause), pinned by version and hash. The same package
gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from chat_corpus.dialogues import Dialogue, read_topic, split_dialogues
from chat_corpus.notice import LICENCE, write_notice
from chat_corpus.sources import LANGUAGES, LEFT_OUT, VERSION
from pypi_model import BuildError, download_wheels, pinned_requirements

ASSETS = Path(__file__).resolve().parent
REQUIREMENTS = ASSETS / "chat_corpus.requirements.txt"
DEFAULT_OUTPUT = ASSETS / "chat"


def topics(wheel: Path, language: str) -> dict[str, str]:
    """Topic -> text of its file. Raises BuildError for a language that the package does not have."""
    folder = f"chatterbot_corpus/data/{language}/"
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(folder))
        files = {Path(name).stem: archive.read(name).decode("utf-8") for name in names}
    if not files:
        raise BuildError(f"{wheel.name} has no language {language!r}")
    return {topic: text for topic, text in files.items() if topic not in LEFT_OUT}


def write_dialogues(file: Path, dialogues: Iterable[Dialogue], language: str) -> None:
    """One JSON object a line: `messages`, and where they come from."""
    lines = []
    for dialogue in dialogues:
        row = {"messages": dialogue.messages(), "source": f"{language}/{dialogue.topic}.yml"}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def build(output: Path, wheel: Path) -> None:
    """Write the files of every language, NOTICE.md and the licence."""
    output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Mapping[str, tuple[int, int]]] = {}
    for language in LANGUAGES:
        units, dropped = [], 0
        for topic, text in topics(wheel, language).items():
            read = read_topic(topic, text)
            units += read.units
            dropped += read.dropped
        splits = split_dialogues(units)
        sizes = {}
        for split, dialogues in splits.items():
            write_dialogues(output / f"{language}.{split}.jsonl", dialogues, language)
            sizes[split] = (len(dialogues), sum(len(dialogue.turns) // 2 for dialogue in dialogues))
        counts[language] = sizes
        texts = (f"{split}: {sizes[split][0]} dialogues, {sizes[split][1]} answers" for split in sizes)
        print(f"{language}: {'; '.join(texts)}; {dropped} entries left out")
    write_notice(output, VERSION, counts)
    if output != DEFAULT_OUTPUT:
        shutil.copyfile(DEFAULT_OUTPUT / LICENCE, output / LICENCE)


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(description="Build dialogues in eight languages from a PyPI package.")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--wheel", type=Path, help="a downloaded wheel, which is used instead of PyPI's")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = options.wheel
            if wheel is None:
                names = [line.split()[0] for line in pinned_requirements(REQUIREMENTS)]
                (wheel,) = download_wheels(REQUIREMENTS, names, Path(scratch))
            build(options.output.resolve(), wheel)
    except (BuildError, OSError, zipfile.BadZipFile) as error:
        print(f"build_chat_corpus: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
