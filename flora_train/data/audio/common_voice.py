"""Reads the tables of a Common Voice release, from its folder or from the downloaded archive.

Layout (Mozilla Data Collective; columns are found by their header because they change between releases):
cv-corpus-<version>-<date>/<locale>/{train,dev,test,validated,...}.tsv, clip_durations.tsv, clips/*.mp3

Cells are not quoted, and sentences with a tab or a line end therefore break their rows.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tarfile
from pathlib import Path, PurePath

from filelock import FileLock

from flora_train.config.errors import choices, did_you_mean, first_line, user_error
from flora_train.config.paths import exists, find_file
from flora_train.config.task_schema import SourceConfig
from flora_train.data.file_rows import Row
from flora_train.data.text_files import decode
from flora_train.runtime.atomic import disk_errors, user_cache

logger = logging.getLogger(__name__)

REQUIRED_COLUMNS = ("path", "sentence")
LOCALE = r"[\w-]+"
FAULT = "fault of the row"
"""Key of a row that cannot be used; the value is the reason."""
DAMAGED_ROW = "damaged row of the table"
NOT_IN_CLIPS = "path that is not of a file in clips/"


def release_file(source: SourceConfig, key: str) -> Path:
    """The table of a split.

    An archive is unpacked once, into the cache. Raises UserError naming what is missing.
    """
    release = _release_path(source, key)
    if release.is_dir() and (archive := _archive_in(release, str(source.locale))) is not None:
        release = archive
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
    release = _release_path(source, key)
    if release.is_dir() and _archive_in(release, str(source.locale)) is None:
        release_file(source, key)


def release_rows(source: SourceConfig, key: str) -> list[Row]:
    """The split's rows.

    `path` is the clip's file, `seconds` its length if the release states it, `release` the release's name.
    A row with too many or too few cells, or with a path that leads out of the folder of clips, has a FAULT,
    and its `path` is that of the table with the line.
    """
    table = release_file(source, key)
    rows = _table_rows(table, key)
    whole = next((row for row in rows if FAULT not in row), None)
    if whole is not None and (missing := [column for column in REQUIRED_COLUMNS if column not in whole]):
        raise user_error(str(table), None, f"has no column {missing[0]!r}: it has {choices(whole)}")
    seconds = _durations(table.with_name("clip_durations.tsv"), key)
    release = release_name(table)
    completed = []
    for row in rows:
        entry = {**row, "release": release}
        if FAULT not in row:
            entry["path"] = str(table.parent / "clips" / row["path"])
            entry["sentence"] = _unquoted(row["sentence"])
        if row["path"] in seconds:
            entry["seconds"] = seconds[row["path"]]
        completed.append(entry)
    return completed


def check_clips_exist(source: SourceConfig, key: str) -> None:
    """Warn about rows whose clip is not in the release's folder; clips are looked up, not read.

    Raises UserError if none of them is there.
    """
    table = release_file(source, key)
    folder = table.parent / "clips"
    try:
        present = {entry.name for entry in os.scandir(folder)}
    except OSError:
        present = set()
    listed = {
        str(row["path"]): None for row in _table_rows(table, key) if row.get("path") and FAULT not in row
    }
    missing = [clip for clip in listed if clip not in present and not _in_subfolder(folder, clip)]
    if not missing:
        return
    first = folder / missing[0]
    if len(missing) == len(listed):
        hint = f"lists {len(listed):,} clips, of which none exists ({first}): unpack the whole archive"
        raise user_error(key, str(table), hint)
    amount = f"{len(missing):,} of {len(listed):,} clips are missing"
    logger.warning(f"{key}: {amount} and will be left out (the first: {first})")


def _in_subfolder(folder: Path, clip: str) -> bool:
    """Whether a clip is a file below a folder inside that of the clips."""
    return "/" in clip and exists(folder / clip)


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


def _archive_in(folder: Path, locale: str) -> Path | None:
    """The newest archive of a language in a folder of downloads that does not have it unpacked as well."""
    if not re.fullmatch(LOCALE, locale):
        return None
    if any(folder.glob("*.tsv")) or (folder / locale).is_dir() or any(folder.glob(f"cv-corpus-*/{locale}")):
        return None
    archives = sorted(folder.glob(f"cv-corpus-*-{locale}.tar.gz"), key=_version)
    return next(reversed(archives), None)


def _version(path: Path) -> tuple[bool, list[int]]:
    """Order of releases by name: 10.0 is newer than 9.0, and a delta, without splits, comes last."""
    return "-delta-" not in path.name, [int(number) for number in re.findall("[0-9]+", path.name)]


def _language_folder(release: Path, source: SourceConfig, key: str) -> Path:
    locale = str(source.locale)
    if not re.fullmatch(LOCALE, locale):
        hint = "must be the name of a language's folder in the release: letters, digits, _ and -"
        raise user_error(f"{key}.locale", locale, hint)
    inner_folders = sorted(
        release.glob(f"cv-corpus-*/{locale}"), key=lambda folder: _version(folder.parent), reverse=True
    )
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


def _table_rows(table: Path, key: str) -> list[Row]:
    """The rows of a table, as column -> cell.

    A row without the header's number of cells has a fault, as does one whose clip is not below the folder of
    clips: a table from elsewhere must not have other files read.
    """
    try:
        lines = decode(table).split("\n")
    except (OSError, ValueError) as error:
        raise user_error(key, str(table), f"cannot be read: {first_line(error)}") from None
    header = lines[0].split("\t")
    repeated = [column for column in REQUIRED_COLUMNS if header.count(column) > 1]
    if repeated:
        raise user_error(
            str(table), None, f"has the column {repeated[0]!r} more than once: leave one of them"
        )
    rows: list[Row] = []
    damaged: list[str] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) == len(header):
            row: Row = dict(zip(header, cells, strict=True))
            if "path" in row and not _is_below(str(row["path"])):
                row |= {"path": f"{table}:{number}", FAULT: NOT_IN_CLIPS}
            rows.append(row)
        elif line.strip():
            rows.append({**dict.fromkeys(header, ""), "path": f"{table}:{number}", FAULT: DAMAGED_ROW})
            amount = "more" if len(cells) > len(header) else "fewer"
            damaged.append(f"line {number} has {amount} cells than the header")
    if damaged and len(damaged) == len(rows):
        raise user_error(key, str(table), f"cannot be read: {damaged[0]}, and no line has as many")
    return rows


def _is_below(path: str) -> bool:
    """Whether a relative path names a file below its folder, links aside."""
    parts = PurePath(path).parts
    return bool(parts) and ".." not in parts and not PurePath(path).is_absolute()


def _unquoted(sentence: str) -> str:
    """A sentence without the quoting of CSV files, which some releases have: \"\"\"Yes,\"\" she said.\"

    Quotation marks around a sentence that has none inside belong to it.
    """
    inner = sentence[1:-1]
    if sentence[:1] == sentence[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return sentence


def _durations(table: Path, key: str) -> dict[str, float]:
    """Clip -> seconds, from the release's table of durations (clip, duration[ms]) if it has one."""
    if not table.exists():
        return {}
    seconds = {}
    for row in _table_rows(table, key):
        column = next((name for name in row if name.startswith("duration")), None)
        if column is not None and row.get("clip") and re.fullmatch("[0-9]{1,12}", str(row[column])):
            seconds[str(row["clip"])] = int(row[column]) / 1000
    return seconds


def _unpacked(archive: Path, key: str) -> Path:
    """The folder with the archive's content. It appears only once it is complete."""
    status = archive.stat()
    name = f"{archive.name.removesuffix('.tar.gz')}-{status.st_size:x}-{status.st_mtime_ns:x}"
    folder = user_cache("releases") / name
    if folder.is_dir():
        return folder
    locks = user_cache("locks")
    for parent in (folder.parent, locks):
        with disk_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
    # the processes of a run share the archive, which one of them unpacks
    with FileLock(locks / f"{name}.lock"):
        if not folder.is_dir():
            logger.info(f"unpacking {archive} ({status.st_size / 1e9:.1f} GB) into {folder}")
            _unpack(archive, folder, key)
    return folder


def _unpack(archive: Path, folder: Path, key: str) -> None:
    """Unpack into a folder beside `folder`, which may be there from a call that was killed, and rename it."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with tarfile.open(archive) as content:
            content.extractall(temporary, filter="data")
        temporary.rename(folder)
    except Exception as error:  # damaged archives raise many types
        hint = f"cannot be unpacked: {first_line(error)}"
        raise user_error(f"{key}.common_voice", str(archive), hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
