"""Reads the tables of a Common Voice release, from its folder or from the downloaded archive.

Layout (Mozilla Data Collective; columns are found by their header because they change between releases):
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
REQUIRED_COLUMNS = ("path", "sentence")


def release_file(source: SourceConfig, key: str) -> Path:
    """The table of a split.

    An archive is unpacked once, into the cache. Raises UserError naming what is missing.
    """
    release = _release_path(source, key)
    if release.is_file():
        release = _unpacked(release, key)
    folder = _language_folder(release, source, key)
    table = folder / f"{source.split}.tsv"
    if not re.fullmatch(r"[\w-]+", source.split) or not table.is_file():
        splits = [path.stem for path in folder.glob("*.tsv")]
        hint = f"is not a split of {folder}; it has {choices(splits)}.{did_you_mean(source.split, splits)}"
        raise user_error(f"{key}.split", source.split, hint)
    return table


def check_release(source: SourceConfig, key: str) -> None:
    """Raises UserError if the release, or the table in its folder, is missing. An archive is not
    unpacked."""
    if _release_path(source, key).is_dir():
        release_file(source, key)


def release_rows(source: SourceConfig, key: str, read_table: Callable[[Path], list[Row]]) -> list[Row]:
    """The split's rows.

    `path` is the clip's file, `seconds` its length if the release states it, `release` the release's name.
    """
    table = release_file(source, key)
    rows = read_table(table)
    if rows and (missing := [column for column in REQUIRED_COLUMNS if column not in rows[0]]):
        raise user_error(str(table), None, f"has no column {missing[0]!r}: it has {choices(rows[0])}")
    seconds = _durations(table.with_name("clip_durations.tsv"), read_table)
    release = release_name(table)
    completed = []
    for row in rows:
        clip = str(table.parent / "clips" / str(row["path"] or ""))
        entry = {**row, "path": clip, "release": release}
        if row["path"] in seconds:
            entry["seconds"] = seconds[row["path"]]
        completed.append(entry)
    return completed


def release_name(table: Path) -> str:
    """`cv-corpus-<version>-<date>` from the path; every release has its own splits."""
    parts = reversed(table.resolve().parts)
    return next((part for part in parts if part.startswith("cv-corpus-")), "an unnamed release")


def _release_path(source: SourceConfig, key: str) -> Path:
    """The release's folder or archive."""
    try:
        path = find_file(str(source.common_voice))
        exists = path.is_file() or path.is_dir()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long a name, a null character, an unknown ~user
        hint = f"is not a readable path: {first_line(error)}"
        raise user_error(f"{key}.common_voice", source.common_voice, hint) from None
    if not exists:
        hint = "no such release: download it from the Mozilla Data Collective, and give its folder or .tar.gz"
        raise user_error(f"{key}.common_voice", source.common_voice, hint)
    return path


def _language_folder(release: Path, source: SourceConfig, key: str) -> Path:
    locale = str(source.locale)
    if not re.fullmatch(r"[\w-]+", locale):
        hint = "must be the name of a language's folder in the release: letters, digits, _ and -"
        raise user_error(f"{key}.locale", locale, hint)
    inner_folders = sorted(release.glob(f"cv-corpus-*/{locale}"), reverse=True)
    for folder in (release / locale, *inner_folders, release):
        if any(folder.glob("*.tsv")) and folder.name == locale:
            return folder
    tables = [*release.glob("*.tsv"), *release.glob("*/*.tsv"), *release.glob("*/*/*.tsv")]
    locales = sorted({table.parent.name for table in tables})
    hint = (
        f"is not a language of {source.common_voice}; it has "
        f"{choices(locales)}.{did_you_mean(locale, locales)}"
    )
    raise user_error(f"{key}.locale", locale, hint)


def _durations(table: Path, read_table: Callable[[Path], list[Row]]) -> dict[str, float]:
    """Clip -> seconds, from the release's table of durations (clip, duration[ms]) if it has one."""
    if not table.exists():
        return {}
    seconds = {}
    for row in read_table(table):
        column = next((name for name in row if name.startswith("duration")), None)
        if column is not None and row.get("clip") and re.fullmatch("[0-9]{1,12}", str(row[column])):
            seconds[str(row["clip"])] = int(row[column]) / 1000
    return seconds


def _unpacked(archive: Path, key: str) -> Path:
    """The folder with the archive's content. It appears only once it is complete."""
    status = archive.stat()
    name = f"{archive.name.removesuffix('.tar.gz')}-{status.st_size:x}-{status.st_mtime_ns:x}"
    cache = user_cache("releases")
    folder = cache / name
    if folder.is_dir():
        return folder
    logger.info(f"unpacking {archive} ({status.st_size / 1e9:.1f} GB) into {folder}")
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".", dir=cache))
    try:
        with tarfile.open(archive) as content:
            content.extractall(temporary, filter="data")
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    except Exception as error:  # damaged archives raise many types
        hint = f"cannot be unpacked: {first_line(error)}"
        raise user_error(f"{key}.common_voice", str(archive), hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
