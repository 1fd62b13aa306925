"""Texts of recipe=routed_local: short functions and paragraphs, each with its language."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from assets.build_routed_mixture import (
    LENGTHS,
    NATURAL,
    PARAGRAPH_ROWS,
    PROGRAMMING,
    ROWS,
    MixtureError,
    build,
)

ROOT = Path(__file__).resolve().parents[3]
CODE = ROOT / "assets" / "code"


def write_paragraphs(folder: Path, rows: int = 60) -> None:
    folder.mkdir(exist_ok=True)
    for language in NATURAL:
        for split in PARAGRAPH_ROWS:
            texts = [f"{language} {split} {number}\u2028" for number in range(rows)]
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
            (folder / f"{language}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def built(tmp_path: Path) -> Path:
    write_paragraphs(tmp_path / "paragraphs")
    assert build(CODE, tmp_path / "paragraphs", tmp_path / "out") == {"train": 432, "validation": 96}
    return tmp_path / "out"


def test_every_language_has_its_rows_with_its_language_and_member(built: Path) -> None:
    for languages, counts in ((PROGRAMMING, ROWS), (NATURAL, PARAGRAPH_ROWS)):
        for language in languages:
            for split, count in counts.items():
                rows = rows_of(built / f"{language}.{split}.jsonl")
                assert len(rows) == count
                assert {row["language"] for row in rows} == {language}
                assert {row["member"] for row in rows} == {f"{language}-lora"}


def test_functions_are_short_licensed_and_of_other_packages_where_held_out(built: Path) -> None:
    for language in PROGRAMMING:
        train, held_out = (rows_of(built / f"{language}.{split}.jsonl") for split in ROWS)
        assert all(len(row["text"]) in LENGTHS and row["license"] for row in train + held_out)
        assert not {row["package"] for row in train} & {row["package"] for row in held_out}


def test_what_is_missing_or_short_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match=r"ces\.train\.jsonl: no such file; .*build_many_languages"):
        build(CODE, tmp_path / "paragraphs", tmp_path / "out")
    write_paragraphs(tmp_path / "paragraphs", rows=5)
    with pytest.raises(MixtureError, match="ces has 5 rows that are short enough, and 48 are needed"):
        build(CODE, tmp_path / "paragraphs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_configs_name_every_file() -> None:
    mixture = yaml.safe_load((ROOT / "data_configs/routed_local.yaml").read_text())["tasks"]["mixture"]
    members = yaml.safe_load((ROOT / "data_configs/routed_members_local.yaml").read_text())["tasks"]
    languages = [*PROGRAMMING, *NATURAL]
    for split in ROWS:
        files = [f"assets/routed_local/{language}.{split}.jsonl" for language in languages]
        assert mixture[split] == files
        assert [task[split] for task in members.values()] == files
    assert list(members) == languages
    recipe = yaml.safe_load((ROOT / "recipes/routed_local.yaml").read_text())
    folders = [f"outputs/routed_members_local/adapters/{language}-lora" for language in languages]
    assert recipe["adapters"]["meteora"]["over"] == folders
