"""A killed final evaluation of labels, embeddings and words of labels goes on where it stopped."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import head_shape
from flora_train.data.batch import MixedBatch
from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.data.task import Task
from flora_train.evaluation.heldout_journal import HeldoutJournal
from flora_train.runtime.distributed import world
from flora_train.training.choice_scores import ChoiceScores, score_choices
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.label_loss import LabelLosses
from flora_train.training.loss import RowLosses
from flora_train.training.preference_rows import RowKey, row_key
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.forked import python
from tests.unit.training.harness import PAD, random_embeddings, random_labels, random_split
from tests.unit.training.test_choice_scores import attached, word_tasks
from tests.unit.training.test_label_isolation import LABELS

PAIRS = EmbeddingSpec("mean", 0.1, symmetric=True)
TRIPLETS = EmbeddingSpec("last", 0.2, has_negatives=True)


def mixed_tasks() -> dict[str, Task]:
    """Text, labels of all kinds, pairs and triplets."""
    tasks = {"a": Task("a", 1.0, random_split(0, 5), random_split(1, 9), "a")}
    for number, (name, label) in enumerate(LABELS.items()):
        halves = (random_labels(2 * number + i, 9, label) for i in (0, 1))
        tasks[name] = Task(name, 1.0, *halves, name, label=label)
    for name, embedding in {"pairs": PAIRS, "triplets": TRIPLETS}.items():
        parts = (random_embeddings(i, 9, embedding) for i in (0, 1))
        tasks[name] = Task(name, 1.0, *parts, name, embedding=embedding)
    return tasks


def mixed_bank() -> AdapterBank:
    """Two adapters of each task. The outputs of one are no numbers."""
    specs = [spec(method, task) for task in mixed_tasks() for method in ("lora", "ia3")]
    with_heads = [replace(s, head=head_shape(LABELS[s.task])) if s.task in LABELS else s for s in specs]
    bank = AdapterBank.attach(tiny_model(), with_heads)
    perturb(bank)
    bank.row(bank.ids["many-ia3"]).fill_(float("nan"))
    return bank


class Killed(BaseException):
    """As a kill between two batches."""


class Counted(RowLosses):
    """Row losses that are recorded, and that end after `most` batches, or `most_pooled` with embeddings."""

    def __init__(
        self,
        bank: AdapterBank,
        tasks: Mapping[str, Task],
        rows: list[RowKey],
        *,
        most: int = 10**9,
        most_pooled: int = 10**9,
    ) -> None:
        super().__init__(bank.model, labels=LabelLosses(bank, tasks))
        self.rows, self.left = rows, {False: most, True: most_pooled}

    def __call__(self, batch: MixedBatch) -> Tensor:
        is_pooled = batch.poolings is not None
        if not self.left[is_pooled]:
            raise Killed
        self.left[is_pooled] -= 1
        losses = super().__call__(batch)
        self.rows += [row_key(row) for row in batch.rows]
        return losses


def journal(folder: Path, bank: AdapterBank, tasks: Mapping[str, Task]) -> HeldoutJournal:
    return HeldoutJournal(folder / "heldout", bank, {name: task.data_hash for name, task in tasks.items()})


def evaluated(losses: RowLosses, bank: AdapterBank, log: HeldoutJournal | None) -> dict[str, HeldOut]:
    tasks = mixed_tasks().values()
    return evaluate_heldout(losses, bank, tasks, max_tokens=60, pad_token=PAD, with_base=True, log=log)


def numbers_of(results: Mapping[str, HeldOut]) -> dict[str, list[float]]:
    """All numbers of results: losses, outputs of heads, losses of embeddings and ranks."""
    numbers: dict[str, list[float]] = {}
    for task, held in results.items():
        for adapter, nats in held.nats.items():
            values = [nats]
            if held.labels is not None:
                values += [np.ravel(outputs) for outputs in held.labels.outputs[adapter]]
            if held.embeddings is not None:
                values += [held.embeddings.first[adapter], held.embeddings.reciprocal_ranks[adapter]]
            numbers[f"{task} {adapter}"] = np.concatenate(values).tolist()
    return numbers


def test_labels_and_embeddings_are_evaluated_once_however_often_it_is_killed(tmp_path: Path) -> None:
    bank, tasks = mixed_bank(), mixed_tasks()
    whole: list[RowKey] = []
    expected = numbers_of(evaluated(Counted(bank, tasks, whole), bank, None))
    rows: list[RowKey] = []
    kills, found = 0, None
    while found is None:
        losses = Counted(bank, tasks, rows, most=7, most_pooled=3)
        try:
            found = numbers_of(evaluated(losses, bank, journal(tmp_path, bank, tasks)))
        except Killed:
            kills += 1
    assert kills > 5
    assert {key: repr(values) for key, values in found.items()} == {
        key: repr(values) for key, values in expected.items()
    }
    assert any(np.isnan(values).any() for values in expected.values())
    assert Counter(rows) == Counter(whole)
    assert max(Counter(rows).values()) == 1
    again: list[RowKey] = []
    evaluated(Counted(bank, tasks, again), bank, journal(tmp_path, bank, tasks))
    assert not again
    journal(tmp_path, bank, tasks).delete()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["adapter", "damage"])
def test_embeddings_of_other_adapters_are_computed_again(tmp_path: Path, change: str) -> None:
    bank, tasks = mixed_bank(), mixed_tasks()
    rows: list[RowKey] = []
    with pytest.raises(Killed):
        evaluated(Counted(bank, tasks, rows, most_pooled=5), bank, journal(tmp_path, bank, tasks))
    embedded = [row for row in rows if row[0] == "pairs"]
    assert embedded
    (file,) = (tmp_path / "heldout" / "embeddings-pairs-0").glob("pieces-*.jsonl")
    if change == "adapter":
        bank.row(bank.ids["pairs-lora"]).add_(0.1)
    else:
        file.write_text(file.read_text().replace('"outputs": ["', '"outputs": ["%', 1))
    expected = numbers_of(evaluated(Counted(bank, tasks, []), bank, None))
    rows.clear()
    found = numbers_of(evaluated(Counted(bank, tasks, rows), bank, journal(tmp_path, bank, tasks)))
    assert repr(found) == repr(expected)
    assert set(embedded) <= set(rows)


def scored(
    losses: RowLosses, bank: AdapterBank, tasks: Mapping[str, Task], log: HeldoutJournal | None
) -> dict[str, ChoiceScores]:
    part = None if log is None else log.part("words")
    return score_choices(losses, bank, tasks, max_tokens=128, pad_token=257, log=part)


def scores_of(results: Mapping[str, ChoiceScores]) -> dict[str, Any]:
    return {
        f"{name} {contender}": values.tolist()
        for name, scores in results.items()
        for contender, values in scores.log_probabilities.items()
    }


def test_words_are_scored_once_however_often_it_is_killed(tmp_path: Path) -> None:
    bank, tasks = attached(), word_tasks(tmp_path / "data")
    whole: list[RowKey] = []
    expected = scores_of(scored(Counted(bank, tasks, whole), bank, tasks, None))
    rows: list[RowKey] = []
    kills, found = 0, None
    while found is None:
        losses = Counted(bank, tasks, rows, most=4)
        try:
            found = scores_of(scored(losses, bank, tasks, journal(tmp_path, bank, tasks)))
        except Killed:
            kills += 1
    assert kills > 2
    assert found == expected
    assert Counter(rows) == Counter(whole)
    assert max(Counter(rows).values()) == 1


def evaluate_in_two_processes(folder: Path) -> None:
    """What each of two processes runs: killed among labels, killed among embeddings, and whole; then words,
    killed and whole. The second one writes the results."""
    dist.init_process_group("gloo")
    rows: list[RowKey] = []
    bank, tasks = mixed_bank(), mixed_tasks()
    for limits in ({"most": 5}, {"most_pooled": 2}):
        try:
            evaluated(Counted(bank, tasks, rows, **limits), bank, journal(folder, bank, tasks))
        except Killed:
            rows.append(("killed", 0, 0, 0))
        dist.barrier()
    results = numbers_of(evaluated(Counted(bank, tasks, rows), bank, journal(folder, bank, tasks)))
    words, word_bank = word_tasks(folder / f"data-{world()[0]}"), attached()
    try:
        scored(Counted(word_bank, words, rows, most=3), word_bank, words, journal(folder, word_bank, words))
    except Killed:
        rows.append(("killed", 0, 0, 0))
    dist.barrier()
    scores = scored(Counted(word_bank, words, rows), word_bank, words, journal(folder, word_bank, words))
    content = {"rows": rows, "numbers": results, "scores": scores_of(scores)}
    (folder / f"results-{world()[0]}.json").write_text(json.dumps(content))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_equal_one(tmp_path: Path) -> None:
    done = python("-m", __name__, str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"results-{rank}.json").read_text()) for rank in (0, 1))
    assert repr(one["numbers"]) == repr(two["numbers"])
    assert one["scores"] == two["scores"]
    bank, tasks, whole = mixed_bank(), mixed_tasks(), list[RowKey]()
    expected = numbers_of(evaluated(Counted(bank, tasks, whole), bank, None))
    for key, values in expected.items():
        assert two["numbers"][key] == pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True)
    words, word_bank = word_tasks(tmp_path / "data"), attached()
    for key, values in scores_of(scored(Counted(word_bank, words, whole), word_bank, words, None)).items():
        np.testing.assert_allclose(two["scores"][key], values, rtol=1e-5)
    rows = Counter(tuple(row) for result in (one, two) for row in result["rows"])
    assert rows.pop(("killed", 0, 0, 0)) == 6
    assert rows == Counter(whole)
    assert max(rows.values()) == 1
    assert all(len(result["rows"]) > len(whole) / 4 for result in (one, two))


if __name__ == "__main__":
    evaluate_in_two_processes(Path(sys.argv[1]))
