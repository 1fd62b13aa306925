"""Where are a language's clips in a release of Common Voice? In its folder, or in the archive that was downloaded.

Layout (Mozilla Data Collective; columns are read by their header, because they change between releases):
cv-corpus-<version>-<date>/<locale>/{train,dev,test,validated,...}.tsv, clip_durations.tsv, clips/*.mp3
"""

from __future__ import annotations

import logging
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, did_you_mean, first_line, user_error
from flora_train.config.paths import find_file
from flora_train.config.task_schema import SourceConfig
from flora_train.runtime.atomic import disk_errors, user_cache

logger = logging.getLogger(__name__)

Row = dict[str, Any]
NEEDED = ("path", "sentence")


def release_file(source: SourceConfig, key: str) -> Path:
    """The table of a split. An archive is unpacked once, into the cache. Raises UserError naming what is missing."""
    try:
        place = find_file(str(source.common_voice))
        found = place.is_file() or place.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a zero in it, an unknown ~user
        raise user_error(
            f"{key}.common_voice", source.common_voice, f"is no path that can be read: {first_line(error)}"
        ) from None
    if not found:
        hint = "no such release here: download it from the Mozilla Data Collective, and give its folder or .tar.gz"
        raise user_error(f"{key}.common_voice", source.common_voice, hint)
    folder = _language_folder(_unpacked(place, key) if place.is_file() else place, source, key)
    table = folder / f"{source.split}.tsv"
    if not re.fullmatch(r"[\w-]+", source.split) or not table.is_file():
        there = [path.stem for path in folder.glob("*.tsv")]
        words = f"is no split of {folder}; there are {choices(there)}.{did_you_mean(source.split, there)}"
        raise user_error(f"{key}.split", source.split, words)
    return table


def release_rows(source: SourceConfig, key: str, read_table: Callable[[Path], list[Row]]) -> list[Row]:
    """The split's rows; `path` is the clip's file, `seconds` its length where the release tells it, `release` its name."""
    table = release_file(source, key)
    rows = read_table(table)
    if rows and (missing := [column for column in NEEDED if column not in rows[0]]):
        raise user_error(str(table), None, f"has no column {missing[0]!r}: it has {choices(rows[0])}")
    seconds = _durations(table.with_name("clip_durations.tsv"), read_table)
    release = release_name(table)
    return [
        {
            **row,
            "path": str(table.parent / "clips" / str(row["path"] or "")),
            "release": release,
            **({"seconds": seconds[row["path"]]} if row["path"] in seconds else {}),
        }
        for row in rows
    ]


def release_name(table: Path) -> str:
    """`cv-corpus-<version>-<date>`, where a folder above says it: splits are made anew for every release."""
    return next((part for part in reversed(table.resolve().parts) if part.startswith("cv-corpus-")), "an unnamed release")


def _language_folder(place: Path, source: SourceConfig, key: str) -> Path:
    locale = str(source.locale)
    if not re.fullmatch(r"[\w-]+", locale):
        raise user_error(f"{key}.locale", locale, "is the name of a language's folder in the release: letters, digits, _ and -")
    for folder in (place / locale, *sorted(place.glob(f"cv-corpus-*/{locale}"), reverse=True), place):
        if any(folder.glob("*.tsv")) and folder.name == locale:
            return folder
    there = sorted({table.parent.name for table in (*place.glob("*.tsv"), *place.glob("*/*.tsv"), *place.glob("*/*/*.tsv"))})
    words = f"is no language of {source.common_voice}; there are {choices(there)}.{did_you_mean(locale, there)}"
    raise user_error(f"{key}.locale", locale, words)


def _durations(table: Path, read_table: Callable[[Path], list[Row]]) -> dict[str, float]:
    """Clip -> seconds, of releases that say so (clip, duration[ms])."""
    if not table.exists():
        return {}
    found = {}
    for row in read_table(table):
        column = next((name for name in row if name.startswith("duration")), None)
        if column is not None and row.get("clip") and re.fullmatch("[0-9]{1,12}", str(row[column])):
            found[str(row["clip"])] = int(row[column]) / 1000
    return found


def _unpacked(archive: Path, key: str) -> Path:
    """The folder that an archive's content was unpacked into; a half unpacked one is never seen."""
    status = archive.stat()
    name = f"{archive.name.removesuffix('.tar.gz')}-{status.st_size:x}-{status.st_mtime_ns:x}"
    cache = user_cache("releases")
    place = cache / name
    if place.is_dir():
        return place
    logger.info(f"unpacking {archive} ({status.st_size / 1e9:.1f} GB) into {place}")
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=cache))
    try:
        with tarfile.open(archive) as content:
            content.extractall(temporary, filter="data")
        try:
            temporary.rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    except Exception as error:  # a damaged archive raises many kinds
        raise user_error(f"{key}.common_voice", str(archive), f"cannot be unpacked: {first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place
