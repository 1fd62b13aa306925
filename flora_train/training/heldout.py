"""How well does every adapter, and the base model, predict the held-out examples of its task?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Collate, Row, collate, group_by_length, prefetch, share_of_rank
from flora_train.data.task import Task
from flora_train.models.loading import set_mode
from flora_train.runtime.distributed import sum_over_processes, world
from flora_train.training.fsdp import run_dummy_passes
from flora_train.training.loss import RowLosses
from flora_train.training.step_plan import heldout_rows


@dataclass(frozen=True)
class HeldOut:
    """Losses on the first n held-out examples of one task, the same for every contender.

    nats: contender id (-1: base) -> float64 [n], summed over an example's learnt tokens;
    label_tokens, label_bytes: int64 [n].
    """

    task: str
    nats: Mapping[int, NDArray[np.float64]]
    label_tokens: NDArray[np.int64]
    label_bytes: NDArray[np.int64]

    def loss(self, contender: int, first: int | None = None) -> float:
        """Mean nats per learnt token, over all examples or the first so many."""
        return float(self.nats[contender][:first].sum() / self.label_tokens[:first].sum())

    def bits_per_byte(self, contender: int) -> float:
        """Bits per UTF-8 byte of learnt text: comparable between tokenizers."""
        return float(self.nats[contender].sum() / np.log(2) / self.label_bytes.sum())


class LossLog(Protocol):
    """Where losses are kept that a kill must not lose. A batch is called by the task, adapter and example of its first row."""

    def known(self, batches: Sequence[Sequence[Row]]) -> Mapping[tuple[str, int, int], Sequence[float]]: ...

    def add(self, batch: Sequence[Row], losses: Sequence[float]) -> None: ...


@torch.no_grad()
def evaluate_heldout(
    row_losses: RowLosses,
    bank: AdapterBank,
    tasks: Iterable[Task],
    max_tokens: int,
    pad_token: int,
    max_examples: int | None = None,
    with_base: bool = False,
    report: Callable[[float], None] = lambda share: None,
    collate: Collate = collate,
    absent: Collection[int] = (),
    log: LossLog | None = None,
) -> dict[str, HeldOut]:
    """Held-out losses per task, all its adapters mixed in the same batches, which are shared out to all processes.

    max_tokens: padded tokens per forward pass; max_examples: the first so many of each task; report: called with the
    share done; absent: adapters that are not asked; log: batches in it are not computed again. The model's routing is the plain base afterwards.
    """
    contenders: dict[str, list[int]] = {}
    for adapter, spec in enumerate(bank.specs):
        if adapter not in absent:
            contenders.setdefault(spec.task, []).append(adapter)
    used = {task.name: task for task in tasks if task.name in contenders}
    by_task: list[list[Row]] = []
    for name, task in used.items():
        if with_base:
            contenders[name].append(BASE_ID)
        by_task.append(heldout_rows(bank, contenders[name], name, task.validation, max_examples))
    sums = {
        (name, adapter): np.zeros(min(len(task.validation), max_examples or len(task.validation)))
        for name, task in used.items()
        for adapter in contenders[name]
    }
    # a batch is of one task: few adapters at a time have to be on the device, and with more rows each
    everyones = [group for part in by_task for group in group_by_length(part, max_tokens)]
    known = {} if log is None else log.known(everyones)
    for group in everyones if world()[0] == 0 else ():  # one process adds what is known, all sum
        for row, loss in zip(group, known.get(_name(group), ()), strict=False):
            sums[row.task, row.adapter][row.example] = loss
    unknown = [group for group in everyones if _name(group) not in known]
    groups = share_of_rank(unknown, *world())
    model = row_losses.model
    training, total = model.training, sum(row.length for group in groups for row in group)
    done = 0
    model.eval()
    try:
        for i, group in enumerate(groups):
            for coming in groups[i : i + 2]:
                prefetch(collate, coming, lambda name: used[name].validation)
            batch = collate(group, lambda name: used[name].validation, pad_token).to(bank.device)
            with bank.routed(batch.adapter_ids):
                losses = row_losses(batch).double().cpu().numpy()
            for row, loss in zip(group, losses, strict=True):
                sums[row.task, row.adapter][row.example] = loss
            if log is not None:
                log.add(group, losses.tolist())
            done += sum(row.length for row in group)
            report(done / total)
        run_dummy_passes(row_losses, bank, unknown)
    finally:
        bank.abandon()  # a process that got no batch still has the routing of its last step
        set_mode(model, training)
    flat = torch.from_numpy(np.concatenate(list(sums.values()))).to(bank.device)
    parts = np.split(
        sum_over_processes(flat).cpu().numpy(), np.cumsum([len(part) for part in sums.values()])[:-1]
    )
    nats = dict(zip(sums, parts, strict=True))
    return {
        name: HeldOut(
            name,
            {adapter: nats[name, adapter] for adapter in contenders[name]},
            task.validation.label_counts[:max_examples],
            task.validation.example_bytes[:max_examples],
        )
        for name, task in used.items()
    }


def _name(batch: Sequence[Row]) -> tuple[str, int, int]:
    return batch[0].task, batch[0].adapter, batch[0].example
