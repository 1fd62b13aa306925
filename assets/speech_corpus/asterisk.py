"""Asterisk: announcements of a telephone system, one speaker a language (CC-BY-SA-3.0)."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from .recording import Recording, same

LANGUAGES = ("en", "es", "fr", "it", "ru")
NOT_SPOKEN = re.compile(r"[\[(<]|^silence/|beep|tone")


def packages(language: str) -> tuple[str, ...]:
    return f"asterisk-core-sounds-{language}", f"asterisk-core-sounds-{language}-g722"


def recordings(language: str, roots: dict[str, Path], versions: dict[str, str]) -> Iterator[Recording]:
    """A sentence is its own scene: there are no others."""
    texts, sounds = packages(language)
    files = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for folder in sorted((roots[sounds] / "usr/share/asterisk/sounds").iterdir())
        if folder.is_dir() and not folder.is_symlink()
        for file in sorted(folder.rglob("*.g722"))
    }
    listing = roots[texts] / f"usr/share/doc/{texts}/core-sounds-{language}.txt.gz"
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8", "replace").splitlines():
        key, found, text = line.partition(":")
        sentence = " ".join(text.split())
        if (
            line.startswith(";")
            or not found
            or key not in files
            or not same(sentence)
            or NOT_SPOKEN.search(f"{key}:{sentence}")
        ):
            continue
        yield Recording(
            language,
            files[key],
            sentence,
            f"{language}, Asterisk",
            same(sentence),
            "Asterisk",
            sounds,
            versions[sounds],
            "CC-BY-SA-3.0",
        )
