"""Fish Fillets: acted dialogues of a game in Czech and Dutch (GPL-2+), one file a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .recording import Recording

LANGUAGES = ("cs", "nl")
TEXTS = "fillets-ng-data"
LINE = re.compile(r'dialogId\("([^"]+)"[^\n]*\)\s*dialogStr\("((?:[^"\\]|\\.)*)"\)')
VOICES = {"m": "small fish", "v": "big fish"}
"""The part of a file's name after the level: malá and velká, the two who speak most."""


def packages(language: str) -> tuple[str, ...]:
    return TEXTS, f"{TEXTS}-{language}"


def recordings(language: str, roots: dict[str, Path], versions: dict[str, str]) -> Iterator[Recording]:
    """roots: package -> where it is unpacked. A level of the game is a scene."""
    sounds = f"{TEXTS}-{language}"
    place = "usr/share/games/fillets-ng"
    for script in sorted(roots[TEXTS].glob(f"{place}/script/*/dialogs_{language}.lua")):
        level = script.parent.name
        for key, text in LINE.findall(script.read_text(encoding="utf-8")):
            file = roots[sounds] / place / "sound" / level / language / f"{key}.ogg"
            sentence = " ".join(text.replace('\\"', '"').replace("\\n", " ").split())
            if not file.exists() or not re.search(r"\w", sentence):
                continue
            voice = VOICES.get([*key.split("-"), "", ""][1], "others")
            yield Recording(
                language,
                file,
                sentence,
                f"{language}, {voice}",
                level,
                "Fish Fillets",
                sounds,
                versions[sounds],
                "GPL-2+",
            )
