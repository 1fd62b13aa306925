"""Files of a glob. Every folder is entered once, so that links to a parent folder do not lead to endless
recursion."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path


def files_matching(pattern: Path) -> list[Path]:
    """The files of a glob, sorted by path; ** matches any number of folders. Hidden files match only a
    pattern with the dot."""
    if "**" not in pattern.parts:
        return sorted(path for path in map(Path, glob.glob(str(pattern))) if path.is_file())
    first_wildcard = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:first_wildcard])
    expression = _expression(pattern.parts[first_wildcard:])
    return sorted(
        path for path in _files_below(root) if expression.fullmatch(path.relative_to(root).as_posix())
    )


def _files_below(root: Path) -> list[Path]:
    files: list[Path] = []
    entered: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(folder) / name for name in names]
        files += [path for path in paths if path.is_file()]
    return files


def _expression(parts: tuple[str, ...]) -> re.Pattern[str]:
    """A regular expression for the parts of a glob with **."""
    text = ""
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if part == "**":
            text += r"(?:.*/)?(?!\.)[^/]*" if is_last else "(?:.*/)?"
            continue
        if not part.startswith("."):
            text += r"(?!\.)"  # hidden files match only a pattern with the dot
        text += fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
        if not is_last:
            text += "/"
    return re.compile(text, re.DOTALL)
