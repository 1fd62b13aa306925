"""Builds what `recipe=common_voice` asks for: a tiny `openai/whisper-large`, and a release of Common Voice.

    python -m tests.headline.build_speech OUT                      clips a language: 12 train, 4 dev, 4 test
    python -m tests.headline.build_speech OUT --clips 40 205 6     enough to reach the recipe's own limits

OUT/models/openai/whisper-large is served by `python -m tests.hub_server OUT`; OUT/cv-corpus-... is the
release's folder, with six languages, and OUT/archives has the same as one .tar.gz per language. Sentences are
those of sentences.yaml, read by espeak-ng (`apt-get install espeak-ng`). The same call writes the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import math
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import yaml

from tests.headline.whisper_large import build_whisper_large

RELEASE = "cv-corpus-0.1-2026-03-09"
"""A version that Common Voice never published."""
VOICES = {"ar": "ar", "cs": "cs", "lt": "lt", "mr": "mr", "mn": "kk", "hi": "hi"}
"""Locale -> voice of espeak-ng, which has no Mongolian: a Kazakh voice reads the same letters."""
SPEAKERS = ("m1", "f2", "m3", "f4", "m5", "f5", "m7")
COLUMNS = (
    *("client_id", "path", "sentence_id", "sentence", "sentence_domain", "up_votes", "down_votes"),
    *("age", "gender", "accents", "variant", "locale", "segment"),
)
SENTENCE_COLUMNS = (
    "sentence_id",
    "sentence",
    "variant",
    "sentence_domain",
    "source",
    "is_used",
    "clips_count",
)
SENTENCES = yaml.safe_load(Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8"))
PARTS = {"train": slice(0, 14), "dev": slice(14, 19), "test": slice(19, 24)}
"""Which sentences of a language each split has."""
LEFT_OUT = {
    "no transcript": 1,
    "no such file": 1,
    "empty file": 1,
    "cannot be decoded": 1,
    "longer than audio.max_seconds": 1,
    "listed twice": 1,
    "also in a held-out split": 2,
    "damaged row of the table": 3,
}
"""Reason -> clips of each language's train.tsv that cannot be used."""
README = """\
# {locale}: not Common Voice

This folder has the layout of a Common Voice release. Its clips were spoken by espeak-ng (voice `{voice}`),
and its sentences were written for the tests of this project (CC0). espeak-ng has no Mongolian voice: a
Kazakh one reads Mongolian, whose letters it knows.
"""


@dataclass(frozen=True)
class Row:
    """A row of a table: its clip and cells."""

    path: str
    sentence: str
    speaker: int = 0


class Locale:
    """One language's folder."""

    def __init__(self, folder: Path, locale: str) -> None:
        self.folder, self.locale = folder, locale
        self.durations: dict[str, int] = {}
        self.number = 19_000_000
        (folder / "clips").mkdir(parents=True)

    def speak(self, sentence: str, speaker: int, seconds: float = 0.0) -> Row:
        """Add a clip of this sentence, repeated until it has `seconds`."""
        variant = SPEAKERS[speaker % len(SPEAKERS)]
        command = ["espeak-ng", "-v", f"{VOICES[self.locale]}+{variant}", "-s", str(150 + speaker % 5 * 10)]
        spoken = subprocess.run([*command, "--stdout", sentence], capture_output=True, check=True).stdout
        samples, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
        published_rate = 48_000 if self.number % 3 == 0 else 32_000
        repeats = max(1, math.ceil(seconds * rate / len(samples)))
        resampled = soxr.resample(np.tile(samples, repeats), rate, published_rate)
        row = self.row(sentence, speaker)
        soundfile.write(self.folder / "clips" / row.path, resampled, published_rate, format="MP3")
        self.durations[row.path] = round(1000 * len(resampled) / published_rate)
        return row

    def row(self, sentence: str, speaker: int) -> Row:
        """A row without a clip."""
        self.number += 1
        return Row(f"common_voice_{self.locale}_{self.number}.mp3", sentence, speaker)

    def cells(self, row: Row) -> dict[str, str]:
        """Column -> cell."""
        identity = hashlib.sha512(f"{self.locale} {row.speaker}".encode()).hexdigest()
        return dict.fromkeys(COLUMNS, "") | {
            "client_id": identity,
            "path": row.path,
            "sentence_id": hashlib.sha256(row.sentence.encode()).hexdigest(),
            "sentence": row.sentence,
            "up_votes": "2",
            "down_votes": "0",
            "age": "twenties",
            "gender": "male_masculine",
            "locale": self.locale,
        }

    def write(self, name: str, rows: Sequence[Row]) -> None:
        """Write a table of clips; its line ends and columns differ between languages as between releases."""
        columns = [column for column in COLUMNS if column != "variant" or self.locale != "mr"]
        lines = [columns, *([self.cells(row)[column] for column in columns] for row in rows)]
        end, encoding = "\n", "utf-8"
        if self.locale == "cs":
            end = "\r\n"
        if self.locale == "lt":
            encoding = "utf-8-sig"
        text = "".join("\t".join(line) + end for line in lines)
        (self.folder / f"{name}.tsv").write_text(text, encoding=encoding, newline="")

    def write_other_tables(self, test: Sequence[Row]) -> None:
        """The tables that a run does not read as splits, broken as they are in releases."""
        if self.locale != "hi":  # the first releases had no durations
            lines = ["clip\tduration[ms]", *(f"{clip}\t{ms}" for clip, ms in self.durations.items())]
            (self.folder / "clip_durations.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        reported = (
            "sentence_id\tsentence\tlocale\treason\n"
            f"1\t{test[0].sentence}\t{self.locale}\tother: a\ttab\nand a line end\n"
        )
        (self.folder / "reported.tsv").write_text(reported, encoding="utf-8")
        for name in ("validated_sentences", "unvalidated_sentences"):
            header = "\t".join(SENTENCE_COLUMNS) + "\n"
            (self.folder / f"{name}.tsv").write_text(header, encoding="utf-8")
        about = README.format(locale=self.locale, voice=VOICES[self.locale])
        (self.folder / "README.md").write_text(about, encoding="utf-8")


def build_locale(folder: Path, locale: str, clips: Sequence[int]) -> None:
    """Write one language's folder. clips: numbers of usable clips in train, dev and test."""
    writer, sentences = Locale(folder, locale), SENTENCES[locale]
    rows: dict[str, list[Row]] = {}
    for (split, part), count in zip(PARTS.items(), clips, strict=True):
        own = sentences[part]
        start = 10 * len(rows)  # no speaker is in two splits
        rows[split] = [writer.speak(own[i % len(own)], start + i // len(own)) for i in range(count)]
    rows["train"] += odd_rows(writer, sentences)
    rows["dev"].append(writer.speak(sentences[19], 11))  # a sentence of test
    for split, of_split in rows.items():
        writer.write(split, of_split)
    writer.write("validated", [row for of_split in rows.values() for row in of_split])
    writer.write("invalidated", [writer.row(sentences[0], 8)])
    writer.write("other", [writer.row(sentences[1], 8)])
    writer.write_other_tables(rows["test"])


def odd_rows(writer: Locale, sentences: Sequence[str]) -> list[Row]:
    """Rows of train.tsv such as releases have; LEFT_OUT counts those that cannot be used."""
    clips = writer.folder / "clips"
    empty, damaged = writer.speak(sentences[1], 6), writer.speak(sentences[2], 6)
    (clips / empty.path).write_bytes(b"")
    (clips / damaged.path).write_bytes((clips / damaged.path).read_bytes()[:40])
    long = writer.speak(sentences[3], 6, seconds=40.0)
    if writer.locale in ("ar", "mn"):
        del writer.durations[long.path]  # its length is only known once it is decoded
    else:
        assert writer.durations[long.path] >= 40_000
    quoted = sentences[4].replace('"', "")
    usable = [
        writer.speak(f'"""{quoted}"" - {sentences[5]}"', 7),  # quoted as in CSV files
        writer.speak(f'"{quoted}', 7),  # not closed
    ]
    tab, line_end = writer.speak(sentences[6], 7), writer.speak(sentences[7], 7)
    unusable = [
        writer.speak("  ", 7),
        writer.row(sentences[0], 7),  # its clip is missing
        empty,
        damaged,
        long,
        usable[0],  # listed twice
        writer.speak(sentences[19], 7),  # also in test,
        writer.speak(sentences[14].upper(), 7),  # and in dev, written otherwise
        Row(tab.path, tab.sentence.replace(" ", "\t", 1), 7),
        Row(line_end.path, line_end.sentence.replace(" ", "\n", 1), 7),
    ]
    return usable + unusable


def pack(folder: Path, archive: Path) -> None:
    """Write a language's folder as it is downloaded, with the release's name around it."""
    archive.parent.mkdir(parents=True, exist_ok=True)

    def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return member

    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        tar.add(folder, f"{folder.parent.name}/{folder.name}", filter=without_owner)


def build(out: Path, clips: Sequence[int] = (12, 4, 4), locales: Sequence[str] = tuple(VOICES)) -> Path:
    """Write model and release below `out`; returns the release's folder."""
    if shutil.which("espeak-ng") is None:
        raise SystemExit("build_speech: espeak-ng is missing: apt-get install espeak-ng")
    release = out / RELEASE
    shutil.rmtree(release, ignore_errors=True)
    for locale in locales:
        build_locale(release / locale, locale, clips)
        pack(release / locale, out / "archives" / f"{RELEASE}-{locale}.tar.gz")
    build_whisper_large(out / "models" / "openai" / "whisper-large")
    return release


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--clips", type=int, nargs=3, default=(12, 4, 4), metavar=("TRAIN", "DEV", "TEST"))
    options = parser.parse_args()
    print(build(options.out, options.clips))


if __name__ == "__main__":
    main()
