"""Log-probabilities of continuations for the base and many adapters, whose rows share batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.evaluation.harness.batches import Place, plan_batches
from flora_train.evaluation.harness.requests import Answer, Report, TokenPair
from flora_train.models.context_length import independent_up_to
from flora_train.models.loading import set_mode
from flora_train.training.loss import CHUNK, RowLosses


@dataclass
class InputTokens:
    """Tokens that the model reads once for all pairs that end with them."""

    tokens: tuple[int, ...]
    pairs: list[int] = field(default_factory=list)
    """Indices of the pairs. Their continuations may differ in the last token, which is not read."""
    scored: int = 0
    """Positions at the end whose logits are needed."""


def unique_inputs(pairs: Sequence[TokenPair], max_length: int) -> list[InputTokens]:
    """The inputs of all pairs. What is longer than max_length loses its first tokens."""
    inputs: dict[tuple[int, ...], InputTokens] = {}
    for index, pair in enumerate(pairs):
        tokens = (pair.context + pair.continuation)[-(max_length + 1) : -1]
        entry = inputs.setdefault(tokens, InputTokens(tokens))
        entry.pairs.append(index)
        entry.scored = max(entry.scored, len(pair.continuation))
    return list(inputs.values())


class Scorer:
    """Scores continuations with a causal model and its adapters.

    max_tokens: padded tokens of a batch. vocabulary: contender -> number of tokens that share the
    probability. The softmax has the dtype of the logits, as in lm_eval.
    """

    def __init__(
        self,
        bank: AdapterBank,
        *,
        max_tokens: int,
        pad_token: int,
        vocabulary: Callable[[int], int],
    ) -> None:
        self.bank, self.model = bank, bank.model
        self.max_tokens, self.pad_token, self.vocabulary = max_tokens, pad_token, vocabulary
        self.head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        self.head_makes_logits = RowLosses(self.model).head_makes_logits

    @torch.no_grad()
    def score(
        self,
        pairs: Sequence[TokenPair],
        contenders: Sequence[int],
        *,
        max_length: int,
        report: Report = lambda share: None,
    ) -> dict[int, list[Answer]]:
        """Contender -> the answer to every pair. A pair has at least one token of each part, and a
        continuation of at most max_length tokens."""
        inputs = unique_inputs(pairs, max_length)
        answers = {contender: [(0.0, False)] * len(pairs) for contender in contenders}
        batches = self._plan(inputs, contenders)
        training = self.model.training
        self.model.eval()
        try:
            for done, batch in enumerate(batches, start=1):
                rows = _Rows(batch, inputs, pairs)
                log_probabilities, greedy = self._score_rows(rows)
                for contender, pair, part in rows.parts():
                    total = float(log_probabilities[part].sum())
                    answers[contender][pair] = total, bool(greedy[part].all())
                report(done / len(batches))
        finally:
            self.bank.abandon()
            set_mode(self.model, training)
        return answers

    def _plan(self, inputs: Sequence[InputTokens], contenders: Sequence[int]) -> list[list[Place]]:
        lengths = [len(entry.tokens) for entry in inputs]
        limit = independent_up_to(self.model.config)
        batches = []
        for block in self.bank.blocks(contenders):
            members = [contender for contender in contenders if contender in block]
            batches += plan_batches(lengths, members, max_tokens=self.max_tokens, independent_up_to=limit)
        return batches

    def _score_rows(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all continuations' tokens, and whether each is the likeliest token. On the
        CPU."""
        device = self.bank.device
        scored = rows.scored.to(device)
        with (
            self.bank.routed(rows.adapters),
            self._head_input(scored) as hidden,
        ):
            logits: Tensor = self.model(
                input_ids=rows.padded(self.pad_token).to(device),
                use_cache=False,
            ).logits
        chunks = logits[0].split(CHUNK)
        if self.head_makes_logits:
            linear: Any = self.head
            chunks = (F.linear(part, linear.weight, linear.bias) for part in hidden[0].split(CHUNK))
        return self._read_off(chunks, rows)

    @contextmanager
    def _head_input(self, scored: Tensor) -> Iterator[list[Tensor]]:
        """Capture the hidden states [n, d] at the scored positions. The head gets only these, as [1, n, d],
        or the first of them where its logits are computed here."""
        caught: list[Tensor] = []

        def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            states = arguments[0][scored]
            caught.append(states)
            if self.head_makes_logits:
                states = states[:1]
            return (states[None], *arguments[1:])

        handle = self.head.register_forward_pre_hook(select)
        try:
            yield caught
        finally:
            handle.remove()

    def _read_off(self, chunks: Any, rows: _Rows) -> tuple[Tensor, Tensor]:
        """The entries of the log-softmax at the rows' targets. chunks: logits [CHUNK, V] of the scored
        positions, in their order."""
        positions, targets = rows.positions, rows.targets
        order = positions.argsort()
        ends = torch.bincount(positions // CHUNK).cumsum(0).tolist()
        sizes = self._vocabularies(rows)
        values: list[Tensor] = []
        greedy: list[Tensor] = []
        for number, logits in enumerate(chunks):
            first = number * CHUNK
            wanted = order[(0, *ends)[number] : ends[number]]
            local = (positions[wanted] - first).to(logits.device)
            wanted_targets = targets[wanted].to(logits.device)
            logits = cut_vocabulary(logits, sizes[first : first + CHUNK])
            scores = logits.log_softmax(-1)
            values.append(scores[local, wanted_targets].cpu())
            greedy.append((scores.argmax(-1)[local] == wanted_targets).cpu())
        inverse = order.argsort()
        return torch.cat(values)[inverse], torch.cat(greedy)[inverse]

    def _vocabularies(self, rows: _Rows) -> Tensor:
        """int64 [n]: the size of the vocabulary at each scored position."""
        sizes = torch.tensor([self.vocabulary(adapter) for adapter in rows.adapters])
        return sizes.repeat_interleave(rows.scored.sum(1))


def cut_vocabulary(logits: Tensor, sizes: Tensor) -> Tensor:
    """Logits [n, V] whose row i gives no probability to tokens from sizes[i] on."""
    vocabulary = logits.shape[-1]
    if bool((sizes >= vocabulary).all()):
        return logits
    tokens = torch.arange(vocabulary, device=logits.device)
    return logits.masked_fill(tokens >= sizes[:, None].to(logits.device), float("-inf"))


class _Rows:
    """The rows of one batch, and the targets of their scored positions."""

    def __init__(
        self, places: Sequence[Place], inputs: Sequence[InputTokens], pairs: Sequence[TokenPair]
    ) -> None:
        self.adapters = [contender for contender, _ in places]
        self.inputs = [inputs[index] for _, index in places]
        self.pairs = pairs
        lengths = torch.tensor([len(entry.tokens) for entry in self.inputs])[:, None]
        counts = torch.tensor([entry.scored for entry in self.inputs])[:, None]
        columns = torch.arange(int(lengths.max()))
        self.mask = (columns < lengths).long()
        """[B, L], 0 at padding, which is on the right."""
        self.scored = (columns < lengths) & (columns >= lengths - counts)
        """bool [B, L], the positions whose logits are needed."""
        self.positions, self.targets = self._targets()
        """int64 [tokens of all continuations]: index of a scored position, and the token that follows."""

    def padded(self, pad_token: int) -> Tensor:
        """Token ids [B, L]."""
        ids = torch.full(self.mask.shape, pad_token)
        for row, entry in enumerate(self.inputs):
            ids[row, : len(entry.tokens)] = torch.tensor(entry.tokens)
        return ids

    def parts(self) -> Iterator[tuple[int, int, slice]]:
        """(contender, pair, its part of `positions`) for all pairs of all rows."""
        start = 0
        for contender, entry in zip(self.adapters, self.inputs, strict=True):
            for pair in entry.pairs:
                end = start + len(self.pairs[pair].continuation)
                yield contender, pair, slice(start, end)
                start = end

    def _targets(self) -> tuple[Tensor, Tensor]:
        positions, targets = [], []
        end = 0
        for entry in self.inputs:
            end += entry.scored
            for pair in entry.pairs:
                continuation = self.pairs[pair].continuation
                positions.append(torch.arange(end - len(continuation), end))
                targets.append(torch.tensor(continuation))
        return torch.cat(positions), torch.cat(targets)
