"""Finds the files that a pattern names. Each folder is entered once, so that links which lead back are no endless tree."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path


def files_matching(pattern: Path) -> list[Path]:
    """The files, sorted by path, that a glob names; ** is any number of folders. Hidden ones only where the pattern says the dot."""
    if "**" not in pattern.parts:
        return sorted(path for path in map(Path, glob.glob(str(pattern))) if path.is_file())
    at = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root, wanted = Path(*pattern.parts[:at]), _expression(pattern.parts[at:])
    return sorted(path for path in _files_below(root) if wanted.fullmatch(path.relative_to(root).as_posix()))


def _files_below(root: Path) -> list[Path]:
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            below.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [path for name in names if (path := Path(folder) / name).is_file()]
    return found


def _expression(parts: tuple[str, ...]) -> re.Pattern[str]:
    text = ""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            text += r"(?:.*/)?(?!\.)[^/]*" if last else "(?:.*/)?"
            continue
        visible = "" if part.startswith(".") else r"(?!\.)"
        text += (
            visible
            + fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
            + ("" if last else "/")
        )
    return re.compile(text, re.DOTALL)
