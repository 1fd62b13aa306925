"""Held-out losses of every adapter, and of the base model, on the examples of its task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Collate, Row, collate, group_by_length, prefetch, share_of_rank
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.split import LabelSplit
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.data.tokenization import TokenSplit
from flora_train.models.loading import set_mode
from flora_train.runtime.distributed import is_main_process, sum_over_processes, world
from flora_train.training.embedding_heldout import Embedder, HeldOutEmbeddings, evaluate_embeddings
from flora_train.training.fsdp import run_dummy_passes
from flora_train.training.label_heldout import HeldOutLabels, OutputStore
from flora_train.training.label_loss import label_weight
from flora_train.training.loss import RowLosses
from flora_train.training.preference_heldout import HeldOutPreferences
from flora_train.training.preference_results import (
    HeldOutReferences,
    needs_base,
    preference_results,
    reward_metrics,
)
from flora_train.training.preference_rows import part_of, row_key
from flora_train.training.result_log import BatchResults, ResultLog
from flora_train.training.step_plan import heldout_rows

Batch = Sequence[Row]
Sums = dict[tuple[str, int, int], NDArray[np.float64]]
"""(task, contender, part of an example) -> summed loss of every example. Parts: see `part_of`."""


@dataclass(frozen=True)
class HeldOut:
    """Losses on the first n held-out examples of one task, the same for every contender."""

    task: str
    nats: Mapping[int, NDArray[np.float64]]
    """Contender id (-1: base) -> [n], summed over the label tokens of an example."""
    label_tokens: NDArray[np.int64] | NDArray[np.float64]
    """[n]; of labelled texts, the weights of their losses."""
    label_bytes: NDArray[np.int64]
    """[n]"""
    preferences: HeldOutPreferences | None = None
    """Log-probabilities and losses of a preference task, whose other fields here are about its chosen
    completions."""
    labels: HeldOutLabels | None = None
    """What the heads of a label task make of the texts. There is no base among its contenders, since a base
    has no head, and its losses have no bits per byte."""
    embeddings: HeldOutEmbeddings | None = None
    """How well anchors find their positives, of a task of embeddings: `nats` are the losses of its examples,
    which have no bits per byte."""

    @property
    def has_text(self) -> bool:
        """Whether text is predicted, whose losses are bits per byte; not of labels and embeddings."""
        return self.labels is None and self.embeddings is None

    def loss(self, contender: int, first: int | None = None) -> float:
        """Mean nats per label token, over all examples or the first of them."""
        count = self.label_tokens[:first].sum()
        return float(self.nats[contender][:first].sum() / count) if count else 0.0

    def objective_loss(self, contender: int) -> float:
        """The mean loss of the task's objective, which the best state is selected by: nats per label token,
        the loss of preferences, or the weighted mean of the losses of labels."""
        if self.preferences is None:
            return self.loss(contender)
        return float(self.preferences.losses[contender].mean())

    def bits_per_byte(self, contender: int) -> float:
        """Bits per UTF-8 byte of the label text: comparable between tokenizers."""
        return float(self.nats[contender].sum() / np.log(2) / self.label_bytes.sum())


@torch.no_grad()
def evaluate_heldout(
    row_losses: RowLosses,
    bank: AdapterBank,
    tasks: Iterable[Task],
    *,
    max_tokens: int,
    pad_token: int,
    max_examples: int | None = None,
    with_base: bool = False,
    with_test: bool = False,
    report: Callable[[float], None] = lambda share: None,
    collate: Collate = collate,
    absent: Collection[int] = (),
    log: ResultLog | None = None,
    references: HeldOutReferences | None = None,
) -> dict[str, HeldOut]:
    """Held-out losses per task. All its adapters are mixed in the same batches, which all processes share.

    max_tokens: padded tokens per forward pass; max_examples: limit per task; with_test: evaluate labelled
    texts on their test rows, where they have some; report: called with the share done; absent: adapters that
    are not evaluated; log: batches in it are not computed again; references: of preferences, where they were
    computed before. Afterwards the model is routed to the plain base.
    """
    contenders = _contenders(bank, absent)
    all_tasks = {task.name: task for task in tasks if task.name in contenders}
    evaluated = {name: task for name, task in all_tasks.items() if task.embedding is None}
    share = _share_of_text(all_tasks, contenders)
    splits = {name: _split(task, with_test) for name, task in evaluated.items()}
    sums: Sums = {}
    outputs: Sums = {}
    stores: dict[str, OutputStore] = {}
    batches: list[Batch] = []
    for name, task in evaluated.items():
        split = splits[name]
        with_labels = isinstance(split, LabelSplit)
        if not with_labels and (with_base or needs_base(task, contenders[name], references)):
            contenders[name].append(BASE_ID)
        examples = min(len(split), max_examples or len(split))
        # a batch is of one task, so that few adapters have to be on the device, with more rows each
        rows = heldout_rows(bank, contenders[name], name, split, max_examples, preference=task.preference)
        for row in rows:
            sums.setdefault((name, row.adapter, part_of(row)), np.zeros(examples))
        if isinstance(split, LabelSplit) and task.label is not None:
            stores[name] = OutputStore(task.label, split, examples)
            outputs |= {(name, adapter, 0): np.zeros(stores[name].size) for adapter in contenders[name]}
        batches += group_by_length(rows, max_tokens)
    known = {} if log is None else log.known(batches)
    if is_main_process():  # one process adds known results, as all are summed
        for batch in batches:
            results_before = known.get(row_key(batch[0]), BatchResults())
            _add(sums, batch, results_before.losses)
            _add_outputs(outputs, batch, results_before.outputs, stores=stores)
    unknown = [batch for batch in batches if row_key(batch[0]) not in known]

    def split_of(task: str) -> TokenSplit:
        return splits[task]

    def compute(batch: Batch) -> None:
        inputs = collate(batch, split_of, pad_token).to(bank.device)
        with bank.routed(inputs.adapter_ids, [row.tokens for row in batch]):
            losses = row_losses(inputs).double().tolist()
        heads = []
        if batch[0].task in stores:
            heads = _outputs_of_heads(batch, row_losses)
        _add(sums, batch, losses)
        _add_outputs(outputs, batch, heads, stores=stores)
        if log is not None:
            log.add(batch, BatchResults(losses, heads))

    training = row_losses.model.training
    row_losses.model.eval()
    try:
        _run_share(
            unknown,
            compute,
            lambda batch: prefetch(collate, batch, split_of),
            lambda done: report(share * done),
        )
        run_dummy_passes(row_losses, bank, unknown)
    finally:
        bank.abandon()  # a process without a batch still has the routing of its last step
        set_mode(row_losses.model, training)
    nats = _sum_over_processes(sums, bank.device)
    by_contender = _sum_over_processes(outputs, bank.device)
    results = {}
    for name, task in evaluated.items():
        store = stores.get(name)
        if store is None:
            results[name] = _result(
                task,
                splits[name],
                contenders[name],
                nats=nats,
                references=references,
                max_examples=max_examples,
            )
        else:
            results[name] = _label_result(task, store, contenders[name], nats=nats, outputs=by_contender)
    embed = Embedder(row_losses, bank, collate, max_tokens, pad_token, log)
    learn_embeddings = [task for task in all_tasks.values() if task.embedding is not None]
    for number, task in enumerate(learn_embeddings):
        if with_base:
            contenders[task.name].append(BASE_ID)
        of_part = partial(_report_part, report, share, number, len(learn_embeddings))
        results[task.name] = _heldout_embeddings(embed, task, contenders[task.name], max_examples, of_part)
    return {name: results[name] for name in all_tasks}


def _share_of_text(tasks: Mapping[str, Task], contenders: Mapping[str, Sequence[int]]) -> float:
    """The share of the tokens of all tasks that tasks without embeddings have."""
    tokens = {name: len(contenders[name]) * task.validation.counts.tokens for name, task in tasks.items()}
    of_text = sum(tokens[name] for name, task in tasks.items() if task.embedding is None)
    return of_text / max(1, sum(tokens.values()))


def _report_part(report: Callable[[float], None], begin: float, number: int, parts: int, done: float) -> None:
    """Report `done` of one of several equal parts of the work that follows `begin`."""
    report(begin + (1 - begin) * (number + done) / parts)


def _heldout_embeddings(
    embed: Embedder,
    task: Task,
    contenders: Sequence[int],
    max_examples: int | None,
    report: Callable[[float], None],
) -> HeldOut:
    """The results of a task of embeddings."""
    embeddings = evaluate_embeddings(embed, task, contenders, max_examples, report)
    examples = len(next(iter(embeddings.losses.values())))
    nothing = np.zeros(examples, dtype=np.int64)
    return HeldOut(
        task.name, embeddings.losses, np.ones(examples, dtype=np.int64), nothing, embeddings=embeddings
    )


def _result(
    task: Task,
    split: TokenSplit,
    contenders: Sequence[int],
    *,
    nats: Sums,
    references: HeldOutReferences | None,
    max_examples: int | None,
) -> HeldOut:
    first = slice(max_examples)
    of_task = {contender: nats[task.name, contender, 0] for contender in contenders}
    preferences = None
    if task.preference is not None and isinstance(split, PreferenceSplit):
        counts, sizes = split.learnt_counts(0), split.learnt_bytes(0)
        if not task.preference.is_supervised:
            preferences = preference_results(task, nats, contenders, references)
    else:
        counts, sizes = split.label_counts, split.example_bytes
    return HeldOut(task.name, of_task, counts[first], sizes[first], preferences)


def _label_result(
    task: Task, store: OutputStore, contenders: Sequence[int], *, nats: Sums, outputs: Sums
) -> HeldOut:
    weights = np.array([label_weight(store.split, example) for example in range(store.examples)])
    of_task = {contender: nats[task.name, contender, 0] for contender in contenders}
    labels = store.result({contender: outputs[task.name, contender, 0] for contender in contenders})
    sizes = np.zeros(store.examples, dtype=np.int64)
    return HeldOut(task.name, of_task, weights, sizes, labels=labels)


def _split(task: Task, with_test: bool) -> TokenSplit:
    """The examples of a task that are evaluated."""
    is_labelled = isinstance(task.validation, LabelSplit | ChoiceSplit)
    return task.evaluated if with_test and is_labelled else task.validation


def heldout_metrics(result: HeldOut, contender: int) -> dict[str, float]:
    """The metrics of a contender, for the log."""
    if result.embeddings is not None:
        return result.embeddings.metrics(contender)
    if result.labels is not None:
        accuracy = result.labels.accuracy(contender)
        metrics = {"loss": result.loss(contender)}
        return metrics if accuracy is None else {**metrics, "accuracy": accuracy}
    metrics = {"loss": result.objective_loss(contender), "bits_per_byte": result.bits_per_byte(contender)}
    if result.preferences is not None:
        metrics |= reward_metrics(result.preferences, contender)
    return metrics


def _contenders(bank: AdapterBank, absent: Collection[int]) -> dict[str, list[int]]:
    """Task -> its adapters."""
    contenders: dict[str, list[int]] = {}
    for adapter, spec in enumerate(bank.specs):
        if adapter not in absent:
            contenders.setdefault(spec.task, []).append(adapter)
    return contenders


def _run_share(
    batches: Sequence[Batch],
    compute: Callable[[Batch], None],
    prefetch: Callable[[Batch], None],
    report: Callable[[float], None],
) -> None:
    """Compute this process's share of the batches, while the next one is prepared."""
    share = share_of_rank(batches, *world())
    total, done = sum(row.length for batch in share for row in batch), 0
    for i, batch in enumerate(share):
        for upcoming in share[i : i + 2]:
            prefetch(upcoming)
        compute(batch)
        done += sum(row.length for row in batch)
        report(done / total)


def _add(sums: Sums, batch: Batch, losses: Sequence[float]) -> None:
    for row, loss in zip(batch, losses, strict=False):
        sums[row.task, row.adapter, part_of(row)][row.example] = loss


def _outputs_of_heads(batch: Batch, row_losses: RowLosses) -> list[NDArray[np.float32]]:
    """What heads made of the rows of the last batch, flat."""
    assert row_losses.labels is not None
    values = row_losses.labels.outputs
    return [values[position].cpu().numpy().reshape(-1) for position in range(len(batch))]


def _add_outputs(
    outputs: Sums,
    batch: Batch,
    heads: Sequence[NDArray[np.float32]],
    *,
    stores: Mapping[str, OutputStore],
) -> None:
    for row, flat in zip(batch, heads, strict=False):
        outputs[row.task, row.adapter, 0][stores[row.task].place(row.example)] = flat


def _sum_over_processes(sums: Sums, device: torch.device) -> Sums:
    if not sums:
        return {}
    flat = torch.from_numpy(np.concatenate(list(sums.values()))).to(device)
    total = sum_over_processes(flat).cpu().numpy()
    ends = np.cumsum([len(part) for part in sums.values()])
    return dict(zip(sums, np.split(total, ends[:-1]), strict=True))
