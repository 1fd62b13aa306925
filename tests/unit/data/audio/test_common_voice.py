"""Releases of Common Voice are read as published, from folder or archive."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import SourceConfig
from flora_train.data.audio.common_voice import DAMAGED_ROW, FAULT, NOT_IN_CLIPS, check_clips_exist
from flora_train.data.sources import read_rows
from tests.speech import write_clip

HEADER = "client_id\tsentence_id\tpath\tsentence\tup_votes\tlocale"
"""Columns stand in another order in every few releases."""


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "cv-corpus-22.0-2025-06-20" / "cs"
    write_clip(folder / "clips" / "common_voice_cs_1.mp3", 0.5)
    rows = [
        's1\tx\tcommon_voice_cs_1.mp3\tŘekl: "Dobrý den\t2\tcs',
        "s2\ty\tcommon_voice_cs_2.mp3\t'Tak ' jo\"\t2\tcs",
    ]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.tsv").write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    (folder / "clip_durations.tsv").write_text("clip\tduration[ms]\ncommon_voice_cs_1.mp3\t504\n")
    return folder.parent


def packed(release: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as out:
        out.add(release, arcname=release.name)
    return archive


def rows_of(place: Path, split: str = "dev", locale: str = "cs") -> list[dict]:
    return read_rows(SourceConfig(common_voice=str(place), locale=locale, split=split), "tasks.cs.validation")


def test_quotes_are_text_and_columns_are_found_by_name(release: Path) -> None:
    first, second = rows_of(release)
    assert first["sentence"] == 'Řekl: "Dobrý den'
    assert second["sentence"] == "'Tak ' jo\""
    assert first["path"] == str(release / "cs" / "clips" / "common_voice_cs_1.mp3")
    assert (first["seconds"], "seconds" in second) == (0.504, False)
    assert first["release"] == "cv-corpus-22.0-2025-06-20"


def test_the_release_folder_and_the_language_folder_are_equivalent(release: Path) -> None:
    assert rows_of(release.parent) == rows_of(release) == rows_of(release / "cs")


def test_an_archive_is_unpacked_once(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = packed(release, tmp_path / "cs.tar.gz")
    first = rows_of(archive)
    assert [row["sentence"] for row in first] == [row["sentence"] for row in rows_of(release)]
    assert Path(first[0]["path"]).exists()
    assert first[0]["release"] == release.name
    assert rows_of(archive) == first
    (unpacked,) = (tmp_path / "cache" / "flora_train" / "releases").iterdir()
    assert unpacked.name.startswith("cs-")


def test_what_a_killed_process_unpacked_is_removed(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = packed(release, tmp_path / "cs.tar.gz")
    program = "import os, sys, tarfile\nfrom pathlib import Path\n"
    program += "from flora_train.data.audio import common_voice\n"
    program += "def extractall(self, folder, **options):\n"
    program += (
        "    Path(folder).mkdir()\n    (Path(folder) / 'half').write_bytes(bytes(9))\n    os._exit(7)\n"
    )
    program += "tarfile.TarFile.extractall = extractall\n"
    program += "common_voice._unpacked(Path(sys.argv[1]), 'tasks.cs.train')\n"
    killed = subprocess.run([sys.executable, "-c", program, str(archive)], check=False)
    releases = tmp_path / "cache" / "flora_train" / "releases"
    assert killed.returncode == 7
    assert len(list(releases.iterdir())) == 1
    assert rows_of(archive)
    (unpacked,) = releases.iterdir()
    assert unpacked.name.startswith("cs-")


def test_damaged_archive_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "cs.tar.gz"
    archive.write_bytes(b"\x1f\x8b no archive")
    with pytest.raises(UserError, match=r"common_voice = .*cannot be unpacked"):
        rows_of(archive)
    assert list((tmp_path / "cache" / "flora_train" / "releases").iterdir()) == []


def test_a_missing_part_of_a_release_is_named(release: Path) -> None:
    with pytest.raises(
        UserError, match=r"locale = 'css': is not a language of .*; it has cs.*Did you mean 'cs'"
    ):
        rows_of(release, locale="css")
    with pytest.raises(
        UserError, match=r"split = 'validation': is not a split of .*; it has .*dev.*test.*train"
    ):
        rows_of(release, split="validation")
    with pytest.raises(UserError, match=r"no such release: download it"):
        rows_of(release / "absent")
    table = release / "cs" / "dev.tsv"
    table.write_text("client_id\tpath\n1\tx.mp3\n")
    with pytest.raises(UserError, match=r"dev\.tsv: has no column 'sentence': it has client_id or path"):
        rows_of(release)
    table.write_text("client_id\tpath\n1\tx.mp3\ttoo many\n1\tx.mp3\n")
    with pytest.raises(UserError, match=r"dev\.tsv: has no column 'sentence'"):
        rows_of(release)
    table.write_text("client_id\tsentence\n1\tx\ttoo many\n1\tx\n")
    with pytest.raises(UserError, match=r"dev\.tsv: has no column 'path'"):
        rows_of(release)
    table.write_text(f"{HEADER}\na\tb\tc\td\te\tf\tone tab too many\n")
    with pytest.raises(UserError, match=r"line 2 has more cells than the header"):
        rows_of(release)


def test_rows_that_a_tab_or_a_line_end_broke_have_a_fault(release: Path) -> None:
    table = release / "cs" / "dev.tsv"
    table.write_text(
        f"{HEADER}\r\n"
        "1\tx\ta.mp3\tone\ttab\t2\tcs\r\n"
        "1\tx\tb.mp3\tone line\nend\t2\tcs\r\n"
        "1\tx\tc.mp3\twhole\t2\tcs\r\n\r\n",
        encoding="utf-8-sig",
        newline="",
    )
    rows = rows_of(release)
    assert [row.get(FAULT) for row in rows] == [DAMAGED_ROW, DAMAGED_ROW, DAMAGED_ROW, None]
    assert [row["path"] for row in rows[:3]] == [f"{table}:{line}" for line in (2, 3, 4)]
    assert rows[3]["sentence"] == "whole"
    table.write_text(f"{HEADER}\nonly\tfour\tcells\there\n")
    with pytest.raises(UserError, match=r"line 2 has fewer cells than the header"):
        rows_of(release)


def test_no_file_outside_the_folder_of_clips_is_read(release: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = release.parent / "secret.mp3"
    write_clip(secret, 0.5)
    write_clip(release / "cs" / "clips" / "part" / "a.mp3", 0.5)
    table = release / "cs" / "dev.tsv"
    paths = ["../../../secret.mp3", str(secret), "part/../../../../secret.mp3", "", ".", "part/a.mp3"]
    lines = [f"1\tx\t{path}\tsentence\t2\tcs" for path in paths]
    table.write_text("\n".join([HEADER, *lines]), encoding="utf-8")
    rows = rows_of(release)
    assert [row.get(FAULT) for row in rows] == [NOT_IN_CLIPS] * 5 + [None]
    assert [row["path"] for row in rows[:2]] == [f"{table}:2", f"{table}:3"]
    check_clips_exist(SourceConfig(common_voice=str(release), locale="cs", split="dev"), "tasks.cs.dev")
    assert "missing" not in caplog.text


@pytest.mark.parametrize("column", ["sentence", "path"])
def test_a_repeated_column_is_an_error(release: Path, column: str) -> None:
    (release / "cs" / "dev.tsv").write_text(f"{HEADER}\t{column}\n1\tx\ta.mp3\tone\t2\tcs\ttwo\n")
    with pytest.raises(UserError, match=rf"dev\.tsv: has the column '{column}' more than once"):
        rows_of(release)


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ('"""Yes,"" she said."', '"Yes," she said.'),
        ('"A ""word"" here"', 'A "word" here'),
        ('"Yes."', '"Yes."'),
        ('"Yes," she said.', '"Yes," she said.'),
        ('"Yes," she said, "no"', '"Yes," she said, "no"'),
        ('""', '""'),
        ('"', '"'),
    ],
)
def test_the_quoting_of_csv_files_is_undone(release: Path, cell: str, sentence: str) -> None:
    (release / "cs" / "dev.tsv").write_text(f"{HEADER}\n1\tx\ta.mp3\t{cell}\t2\tcs\n", encoding="utf-8")
    assert [row["sentence"] for row in rows_of(release)] == [sentence]


def test_a_folder_of_archives_is_a_release(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    expected = [row["sentence"] for row in rows_of(release)]
    for name in ("cv-corpus-9.0-2022-04-27", "cv-corpus-10.0-2022-07-04", "cv-corpus-23.0-delta-2025-09-05"):
        packed(release.rename(release.with_name(name)), downloads / f"{name}-cs.tar.gz")
        release = release.with_name(name)
    rows = rows_of(downloads)
    assert [row["sentence"] for row in rows] == expected
    assert rows[0]["release"] == "cv-corpus-10.0-2022-07-04"
    with pytest.raises(UserError, match="locale = 'hi'"):
        rows_of(downloads, locale="hi")


def test_missing_clips_are_named_without_reading_any(release: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = SourceConfig(common_voice=str(release), locale="cs", split="test")
    check_clips_exist(source, "tasks.cs.test")
    first = release / "cs" / "clips" / "common_voice_cs_2.mp3"
    assert f"tasks.cs.test: 1 of 2 clips are missing and will be left out (the first: {first})" in caplog.text
    (release / "cs" / "clips" / "common_voice_cs_1.mp3").unlink()
    with pytest.raises(UserError, match=r"lists 2 clips, of which none exists .*unpack the whole archive"):
        check_clips_exist(source, "tasks.cs.test")
