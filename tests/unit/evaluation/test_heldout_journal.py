"""A killed final evaluation is resumed bit-identically, unless it is another evaluation."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.data.task import Task
from flora_train.evaluation.heldout_journal import HeldoutJournal
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.loss import RowLosses
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.forked import python
from tests.unit.training.harness import PAD, random_split

TASKS = [
    Task(name, 1.0, random_split(0, 5), random_split(seed, 9), name * 8)
    for name, seed in (("a", 1), ("b", 2))
]


class Counted:
    """Row losses that are counted, and that end after `most` batches."""

    def __init__(self, model: Any, most: int = 10**9) -> None:
        self.inner, self.model, self.most, self.done = RowLosses(model), model, most, 0

    def __call__(self, batch: Any) -> Tensor:
        if self.done == self.most:
            raise KeyboardInterrupt
        self.done += 1
        return self.inner(batch)


def perturbed_bank() -> AdapterBank:
    found = AdapterBank.attach(
        tiny_model(), [spec(method, task) for task in "ab" for method in ("flora", "lora")]
    )
    perturb(found)
    return found


@pytest.fixture
def bank() -> AdapterBank:
    return perturbed_bank()


def log_of(folder: Path, bank: AdapterBank, **data: str) -> HeldoutJournal:
    return HeldoutJournal(folder / "heldout", bank, {task.name: task.data_hash for task in TASKS} | data)


def evaluated(bank: AdapterBank, losses: Counted, log: HeldoutJournal | None) -> dict[str, HeldOut]:
    return evaluate_heldout(losses, bank, TASKS, max_tokens=60, pad_token=PAD, with_base=True, log=log)  # type: ignore[arg-type]


def assert_same(found: dict[str, HeldOut], expected: dict[str, HeldOut]) -> None:
    for name, held in expected.items():
        for adapter, nats in held.nats.items():
            assert np.array_equal(found[name].nats[adapter], nats)
            assert (nats > 0).all()


def test_a_resumed_evaluation_repeats_nothing_and_is_bit_identical(bank: AdapterBank, tmp_path: Path) -> None:
    whole = Counted(bank.model)
    expected = evaluated(bank, whole, None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluated(bank, Counted(bank.model, most=3), log_of(tmp_path, bank))
    with (tmp_path / "heldout" / "pieces-0.jsonl").open("a") as file:
        file.write('{"task": "a", "adap')  # as a kill in the middle of a line leaves it
    last = Counted(bank.model)
    assert_same(evaluated(bank, last, log_of(tmp_path, bank)), expected)
    assert last.done == whole.done - 6
    again = Counted(bank.model)
    log = log_of(tmp_path, bank)
    assert_same(evaluated(bank, again, log), expected)
    assert again.done == 0
    log.delete()
    assert not list(tmp_path.iterdir())


def test_losses_of_another_process_count_once(bank: AdapterBank, tmp_path: Path) -> None:
    """As two processes leave them: in a file each."""
    expected = evaluated(bank, Counted(bank.model), log_of(tmp_path, bank))
    first = tmp_path / "heldout" / "pieces-0.jsonl"
    lines = first.read_text().splitlines(keepends=True)
    first.write_text("".join(lines[::2]))
    (tmp_path / "heldout" / "pieces-1.jsonl").write_text("".join(lines[1::2]))
    again = Counted(bank.model)
    assert_same(evaluated(bank, again, log_of(tmp_path, bank)), expected)
    assert again.done == 0


@pytest.mark.parametrize("change", ["adapter", "data", "damage"])
def test_losses_of_other_adapters_or_rows_are_deleted(bank: AdapterBank, tmp_path: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluated(bank, Counted(bank.model, most=3), log_of(tmp_path, bank))
    if change == "adapter":
        bank.row(0).add_(0.1)
    if change == "damage":
        (tmp_path / "heldout" / "pieces-0.jsonl").write_text("nonsense\n")
    whole = Counted(bank.model)
    expected = evaluated(bank, whole, None)
    last = Counted(bank.model)
    assert_same(
        evaluated(bank, last, log_of(tmp_path, bank, **({"a": "other"} if change == "data" else {}))),
        expected,
    )
    assert last.done == whole.done


def evaluate_in_two_processes(folder: str) -> None:
    """What each of two processes runs. The second one reads files a second late, and writes nats.json."""
    dist.init_process_group("gloo")
    bank = perturbed_bank()
    log = log_of(Path(folder), bank)
    if dist.get_rank() == 1:
        read = log.log.read
        log.log.read = lambda: (time.sleep(1.0), read())[1]  # type: ignore[method-assign]
    found = evaluated(bank, Counted(bank.model), log)
    if dist.get_rank() == 1:
        nats = {name: {a: n.tolist() for a, n in held.nats.items()} for name, held in found.items()}
        (Path(folder) / "nats.json").write_text(json.dumps(nats))
    dist.barrier()
    dist.destroy_process_group()


def test_a_process_that_reads_the_journal_late_leaves_no_batch_out(bank: AdapterBank, tmp_path: Path) -> None:
    done = python("-m", __name__, str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "nats.json").read_text())
    for name, held in evaluated(bank, Counted(bank.model), None).items():
        for adapter, nats in held.nats.items():
            assert found[name][str(adapter)] == pytest.approx(nats.tolist(), rel=1e-5)


if __name__ == "__main__":
    evaluate_in_two_processes(sys.argv[1])
