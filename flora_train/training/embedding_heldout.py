"""Held-out embeddings of base and adapters: their loss, and how well an anchor finds its positive."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.data.batch import Collate, Row, group_by_length, share_of_rank
from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.data.embeddings.split import ANCHOR, POSITIVE, EmbeddingSplit
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.models.loading import set_mode
from flora_train.runtime.distributed import is_main_process, sum_over_processes, world
from flora_train.training.embedding_loss import DrawEmbeddings, DrawTexts, contrastive_losses
from flora_train.training.fsdp import run_dummy_passes
from flora_train.training.loss import RowLosses
from flora_train.training.preference_rows import row_key
from flora_train.training.result_log import BatchResults, ResultLog

Values = NDArray[np.float64]
MOST_NUMBERS = 1 << 28
"""Numbers of embeddings, and of similarities, that are in memory at the same time."""


@dataclass(frozen=True)
class HeldOutEmbeddings:
    """How well the anchors of n held-out pairs or triplets find their positives.

    The mappings lead from a contender's id (-1: base) to an array [n]. Ties count as the mean over their
    orders.
    """

    spec: EmbeddingSpec
    candidates: int
    """Different texts among which each positive is searched: the positives and negatives of all examples."""
    losses: Mapping[int, Values]
    """The loss of each example in a group of at least `spec.examples_per_draw`."""
    first: Mapping[int, Values]
    """1 where the positive is closest to its anchor, else 0: recall at 1."""
    reciprocal_ranks: Mapping[int, Values]
    """1 / rank of the positive by its cosine similarity to the anchor."""

    def metrics(self, contender: int) -> dict[str, float]:
        """The metrics of a contender, for the log."""
        return {
            "loss": float(self.losses[contender].mean()),
            "recall_at_1": float(self.first[contender].mean()),
            "mrr": float(self.reciprocal_ranks[contender].mean()),
        }


@dataclass(frozen=True)
class Embedder:
    """Computes the embeddings of rows. Arguments as of `evaluate_heldout`."""

    row_losses: RowLosses
    bank: AdapterBank
    collate: Collate
    max_tokens: int
    pad_token: int
    log: ResultLog | None = None

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[Row], split: TokenSplit, report: Callable[[float], None], part: str = "all"
    ) -> NDArray[np.float32]:
        """[rows, d], the same on every process. Collective. Afterwards the model is routed to the base.

        part: the name of the rows in the log.
        """
        places = {row: place for place, row in enumerate(rows)}
        batches = group_by_length(rows, self.max_tokens)
        log = None if self.log is None else self.log.part(part)
        known = {} if log is None else log.known(batches)
        unknown = [batch for batch in batches if row_key(batch[0]) not in known]
        share = share_of_rank(unknown, *world())
        training = self.row_losses.model.training
        self.row_losses.model.eval()
        values = torch.zeros(len(rows), self.row_losses.width, device=self.bank.device)
        if is_main_process():  # one process adds known embeddings, as all are summed
            for batch in batches:
                if row_key(batch[0]) in known:
                    outputs = np.stack(known[row_key(batch[0])].outputs)
                    values[[places[row] for row in batch]] = torch.from_numpy(outputs).to(values)
        try:
            for done, batch in enumerate(share, start=1):
                inputs = self.collate(batch, lambda task: split, self.pad_token).to(self.bank.device)
                with self.bank.routed(inputs.adapter_ids, [row.tokens for row in batch]):
                    embeddings = self.row_losses.outputs(inputs).embeddings
                assert embeddings is not None
                values[[places[batch[i]] for i in embeddings.positions]] = embeddings.values.float()
                if log is not None:
                    computed = values[[places[row] for row in batch]].cpu().numpy()
                    log.add(batch, BatchResults(outputs=list(computed)))
                report(done / len(share))
            run_dummy_passes(self.row_losses, self.bank, unknown)
        finally:
            self.bank.abandon()
            set_mode(self.row_losses.model, training)
        return sum_over_processes(values).cpu().numpy()


def evaluate_embeddings(
    embed: Embedder,
    task: Task,
    contenders: Sequence[int],
    max_examples: int | None,
    report: Callable[[float], None] = lambda share: None,
) -> HeldOutEmbeddings:
    """The held-out results of a task for these contenders. Collective."""
    split = task.validation
    assert isinstance(split, EmbeddingSplit)
    examples = len(split) if max_examples is None else min(len(split), max_examples)
    texts = texts_of(split, range(examples))
    found: dict[int, tuple[Values, Values, Values]] = {}
    search = _Search(texts)
    size = max(1, MOST_NUMBERS // (examples * split.spec.texts * embed.row_losses.width))
    for number, group in enumerate(_groups(embed.bank, contenders, size)):
        rows = [
            Row(contender, task.name, i, split.size(i, part), document=part)
            for contender in group
            for part in range(split.spec.texts)
            for i in range(examples)
        ]
        of_group = partial(_report, report, len(found), len(group), len(contenders))
        values = embed(rows, split, of_group, f"embeddings-{task.name}-{number}")
        by_contender = values.reshape(len(group), split.spec.texts, examples, -1)
        for contender, parts in zip(group, torch.from_numpy(by_contender), strict=True):
            found[contender] = (heldout_losses(parts, texts, split.spec), *search.ranks(parts))
    return HeldOutEmbeddings(
        split.spec,
        search.candidates,
        *({contender: results[i] for contender, results in found.items()} for i in range(3)),
    )


def texts_of(split: EmbeddingSplit, examples: Sequence[int]) -> DrawTexts:
    """What identifies the texts of examples: their tokens."""
    return DrawTexts(*([split.text(i, part).tobytes() for i in examples] for part in range(split.spec.texts)))


def heldout_losses(parts: Tensor, texts: DrawTexts, spec: EmbeddingSpec) -> Values:
    """The loss of each example, [n]. parts: embeddings [texts, n, d].

    Consecutive examples are compared in groups of about equal size, of at least `spec.examples_per_draw`.
    """
    examples = parts.shape[1]
    losses = []
    for indices in np.array_split(np.arange(examples), max(1, examples // spec.examples_per_draw)):
        first, end = int(indices[0]), int(indices[-1]) + 1
        of_group = DrawTexts(texts.anchors[first:end], texts.positives[first:end], texts.negatives[first:end])
        embeddings = DrawEmbeddings(*(part[first:end] for part in parts))
        losses.append(
            contrastive_losses(
                embeddings, of_group, temperature=spec.temperature, symmetric=spec.symmetric
            ).numpy()
        )
    return np.concatenate(losses)


class _Search:
    """The search for the positive of every anchor among all different positives and negatives.

    A text that belongs to the anchor in another row, and the anchor's own text, are no candidates of it.
    """

    def __init__(self, texts: DrawTexts) -> None:
        place_of: dict[Hashable, int] = {}
        self._sources: list[tuple[int, int]] = []
        """Of each candidate, a part and an example that have its text."""
        for part, of_part in ((POSITIVE, texts.positives), (POSITIVE + 1, texts.negatives)):
            for example, text in enumerate(of_part):
                if text not in place_of:
                    place_of[text] = len(self._sources)
                    self._sources.append((part, example))
        belongs: dict[Hashable, set[int]] = {}
        for anchor, positive in zip(texts.anchors, texts.positives, strict=True):
            belongs.setdefault(anchor, set()).add(place_of[positive])
        self._own = [place_of[positive] for positive in texts.positives]
        self._excluded: list[list[int]] = []
        for anchor, own in zip(texts.anchors, self._own, strict=True):
            excluded = belongs[anchor] | ({place_of[anchor]} if anchor in place_of else set())
            self._excluded.append(sorted(excluded - {own}))

    @property
    def candidates(self) -> int:
        return len(self._sources)

    def ranks(self, parts: Tensor) -> tuple[Values, Values]:
        """Recall at 1 and reciprocal rank of each example, [n] each. parts: embeddings [texts, n, d]."""
        anchors = F.normalize(parts[ANCHOR].double(), dim=1, eps=1e-12)
        where, which = (torch.tensor(column) for column in zip(*self._sources, strict=True))
        candidates = F.normalize(parts[where, which].double(), dim=1, eps=1e-12)
        first, reciprocal = np.zeros(len(anchors)), np.zeros(len(anchors))
        step = max(1, MOST_NUMBERS // max(1, len(candidates)))
        for begin in range(0, len(anchors), step):
            similarities = anchors[begin : begin + step] @ candidates.T
            for i, row in enumerate(similarities, start=begin):
                own = row[self._own[i]].clone()
                row[self._excluded[i]] = float("-inf")
                closer = int((row > own).sum())
                ties = int((row == own).sum())
                first[i], reciprocal[i] = _over_orders(closer, ties, finite=bool(own.isfinite()))
        return first, reciprocal


def _over_orders(closer: int, ties: int, *, finite: bool) -> tuple[float, float]:
    """Means, over all orders of ties (the positive among them), of whether the positive is first, and of
    1 / rank. Embeddings that are not finite find nothing."""
    if not finite:
        return 0.0, 0.0
    ranks = np.arange(closer + 1, closer + ties + 1)
    return float(not closer) / ties, float((1 / ranks).mean())


def _groups(bank: AdapterBank, contenders: Sequence[int], size: int) -> Iterator[list[int]]:
    """Contenders that are evaluated together: they fit on the device, and their embeddings into memory."""
    for block in bank.blocks(contenders):
        members = sorted(block)
        for begin in range(0, len(members), size):
            yield members[begin : begin + size]


def _report(report: Callable[[float], None], done: int, group: int, total: int, share: float) -> None:
    report((done + share * group) / total)
