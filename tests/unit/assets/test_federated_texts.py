"""Texts of recipe=federated_local: as many for each chapter, and development texts that are no test texts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from assets.build_federated_texts import HELD_OUT, SOURCES, TextsError, build

CHAPTERS = ("ch01", "ch02")
SIZES = (9, 5, 3, 2)
"""Diagnoses of the categories of a chapter, which repeat."""


def write_corpus(folder: Path, *, short: bool = False) -> None:
    """Diagnoses of two chapters, each with its category."""
    folder.mkdir()
    for chapter in CHAPTERS:
        for name, (ending, count) in SOURCES.items():
            rows, category = [], 0
            while len(rows) < count + 5:
                for number in range(SIZES[category % len(SIZES)]):
                    text = f"{chapter} {name} {category} {number}"
                    rows.append({"text": text, "label": f"{chapter}-block", "group": f"{chapter}{category}"})
                category += 1
            if short:
                rows = rows[: count - 1]
            lines = [json.dumps(row) + "\n" for row in rows]
            (folder / f"{chapter}.{ending}.jsonl").write_text("".join(lines), encoding="utf-8")


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    build(tmp_path / "corpus", tmp_path / "out", development=True)
    return tmp_path / "out"


def test_every_chapter_has_as_many_texts(built: Path) -> None:
    for name, (_, count) in SOURCES.items():
        rows = rows_of(built / f"{name}.jsonl")
        assert Counter(row["label"] for row in rows) == dict.fromkeys(CHAPTERS, count)
        assert {row["block"] for row in rows} == {f"{chapter}-block" for chapter in CHAPTERS}


def test_development_divides_the_training_texts_by_whole_categories(built: Path) -> None:
    parts = {part: rows_of(built / f"development.{part}.jsonl") for part in ("train", "validation")}
    texts = {part: [row["text"] for row in rows] for part, rows in parts.items()}
    training = [row["text"] for row in rows_of(built / "train.jsonl")]
    assert sorted(texts["train"] + texts["validation"]) == sorted(training)
    categories = {part: {text.rsplit(" ", 1)[0] for text in own} for part, own in texts.items()}
    assert not categories["train"] & categories["validation"]
    counts = Counter(row["label"] for row in parts["validation"])
    assert counts.keys() == set(CHAPTERS)
    assert all(HELD_OUT - min(SIZES) <= count <= HELD_OUT for count in counts.values())


def test_development_changes_no_other_file(tmp_path: Path, built: Path) -> None:
    assert build(tmp_path / "corpus", tmp_path / "plain").keys() == SOURCES.keys()
    for name in SOURCES:
        assert (tmp_path / "plain" / f"{name}.jsonl").read_bytes() == (built / f"{name}.jsonl").read_bytes()
    assert not (tmp_path / "plain" / "development.train.jsonl").exists()


def test_missing_and_short_sources_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TextsError, match=r"has no diagnoses: run python assets/build_clinical_corpus\.py"):
        build(tmp_path, tmp_path / "out")
    write_corpus(tmp_path / "short", short=True)
    with pytest.raises(TextsError, match=r"has 95 rows, and 96 are needed"):
        build(tmp_path / "short", tmp_path / "out")
    assert not (tmp_path / "out").exists()
