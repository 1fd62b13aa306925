"""Tux Paint: what its stamps show, said in many languages (GPL-2+)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .recording import Recording, same

LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
PACKAGE = "tuxpaint-stamps-default"


def packages(language: str) -> tuple[str, ...]:
    return (PACKAGE,)


def recordings(language: str, roots: dict[str, Path], versions: dict[str, str]) -> Iterator[Recording]:
    """NAME.txt says in its lines <language>.utf8=... what NAME_desc_<language>.ogg says aloud."""
    stamps = roots[PACKAGE] / "usr/share/tuxpaint/stamps"
    for file in sorted(stamps.rglob(f"*_desc_{language}.ogg")):
        texts = file.with_name(f"{file.name.removesuffix(f'_desc_{language}.ogg')}.txt")
        if not texts.exists():
            continue
        lines = texts.read_text(encoding="utf-8", errors="replace").splitlines()
        sentence = next(
            (line.partition("=")[2] for line in lines if line.startswith(f"{language}.utf8=")), ""
        )
        sentence = " ".join(sentence.split())
        if same(sentence):
            speaker, scene = f"{language}, Tux Paint", same(sentence)
            yield Recording(
                language, file, sentence, speaker, scene, "Tux Paint", PACKAGE, versions[PACKAGE], "GPL-2+"
            )
