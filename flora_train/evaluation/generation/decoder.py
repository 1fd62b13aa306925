"""Decodes prompts for many adapters in one batch that is refilled as rows end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.data.chat.prompts import Prompt
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.generation.attention import decoding_attention
from flora_train.evaluation.generation.batching_mode import (
    BatchingMode,
    batching_mode,
    generate_row,
    next_logits,
    parameters_of,
)
from flora_train.evaluation.generation.context_limit import check_room
from flora_train.evaluation.generation.kv_cache import RowCache
from flora_train.evaluation.generation.merged_decoding import MergedDecoding
from flora_train.evaluation.generation.requests import (
    Adjust,
    Blocks,
    Ended,
    Generated,
    Request,
    Row,
    Stream,
    without_end,
)
from flora_train.evaluation.generation.sampling import Sampling
from flora_train.models.loading import set_mode

REFILL = 0.75
"""Prompts are read in when at most this share of the batch is in use; one at a time would cost a forward pass
each.
"""


class Decoder:
    """Decodes requests with a causal model and its adapters.

    route: maps the adapter ids of a batch's rows to a context in which the model applies them (`bank.routed`,
    or a null context for a model without a bank). max_rows: rows decoded at the same time. blocks: splits
    adapter ids into groups that fit in one batch (`bank.blocks`). merging: merges the adapter of a batch of
    one adapter where that is faster; it belongs to the bank of `route`. adjust: changes the logits [B, V] of
    rows before tokens are drawn from them.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        route: Callable[[Sequence[int]], AbstractContextManager[Any]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        max_rows: int = 32,
        blocks: Blocks = lambda adapters: [frozenset(adapters)],
        merging: MergedDecoding | None = None,
        adjust: Adjust | None = None,
    ) -> None:
        if merging is not None:
            route = merging.routed
        self.merging, self.adjust = merging, adjust
        self.model, self.tokenizer, self.route, self.sampling = model, tokenizer, route, sampling
        self.max_new_tokens, self.max_rows, self.blocks = max_new_tokens, max_rows, blocks
        self.encoder = TextEncoder(tokenizer)
        self.device = next(model.parameters()).device
        self._parameters = parameters_of(model)
        self._end_tokens = end_tokens_of(model, tokenizer)
        self._stream: Stream = lambda request, sample, tokens: None

    @torch.no_grad()
    def run(
        self,
        requests: Sequence[Request],
        report: Callable[[Generated], None],
        stream: Stream = lambda request, sample, tokens: None,
    ) -> None:
        """Call `report` for every sample as it ends, starting with the longest prompts.

        Raises UserError if a prompt and its continuation are longer than the model can read.
        """
        self._stream = stream
        prompts = [self._prompt(request) for request in requests]
        check_room(self.model.config, max(map(len, prompts), default=0), self.max_new_tokens)
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))
        training = self.model.training
        self.model.eval()
        try:
            for block in self.blocks({request.adapter for request in requests}):
                waiting: deque[list[Row]] = deque()
                for i in order:
                    if requests[i].adapter in block:
                        waiting.extend(self._rows(i, requests[i], prompts[i]))
                self._decode(waiting, report)
        finally:
            if self.merging is not None:
                self.merging.release()
            set_mode(self.model, training)

    def _decode(self, waiting: deque[list[Row]], report: Callable[[Generated], None]) -> None:
        mode = batching_mode(self.model)
        if mode == "batched":
            self._decode_batched(waiting, report)
            return
        while waiting:
            rows = waiting.popleft()
            while rows:
                row = rows.pop(0)
                coming = [group for group in (rows, *waiting) if group]
                self._merge_if_cheaper([row], coming, max_rows=1)
                self._decode_row(mode, row, report)

    def _decode_batched(self, waiting: deque[list[Row]], report: Callable[[Generated], None]) -> None:
        live: list[Row] = []
        cache: RowCache | None = None
        with decoding_attention(self.model):
            while waiting or live:
                if admitted := self._admit(waiting, len(live)):
                    new_cache = self._read(admitted)
                    live += chain.from_iterable(admitted)
                    if cache is None:
                        cache = new_cache
                    else:
                        cache.join(new_cache)
                elif cache is not None:
                    self._merge_if_cheaper(live, waiting, max_rows=self.max_rows)
                    self._step(live, cache)
                ended = [i for i, row in enumerate(live) if self._ended(row, report)]
                if ended and cache is not None:
                    live = [live[i] for i in cache.drop(ended)]
                    cache = cache if live else None

    def _merge_if_cheaper(
        self, live: Sequence[Row], waiting: Iterable[Sequence[Row]], *, max_rows: int
    ) -> None:
        if self.merging is not None:
            self.merging.prepare(
                live,
                waiting,
                limit=self.max_new_tokens,
                max_rows=max_rows,
                admit_at=int(REFILL * max_rows),
            )

    def _decode_row(self, mode: BatchingMode, row: Row, report: Callable[[Generated], None]) -> None:
        def choose(logits: Tensor) -> int:
            self._draw(logits, [row])
            return row.tokens[-1]

        with self.route([row.adapter]):
            generate_row(
                self.model,
                mode,
                row.prompt,
                choose=choose,
                ended=lambda: self._ended(row, report),
                max_new_tokens=self.max_new_tokens,
            )

    def _admit(self, waiting: deque[list[Row]], num_live: int) -> list[list[Row]]:
        """Groups of rows to read in now: none while the batch is nearly full, otherwise as many as fit."""
        if num_live > REFILL * self.max_rows:
            return []
        admitted: list[list[Row]] = []
        room = self.max_rows - num_live
        while waiting and len(waiting[0]) <= room:
            room -= len(waiting[0])
            admitted.append(waiting.popleft())
        return admitted

    def _prompt(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            return self.encoder.prompt(request.prompt, request.special_tokens)
        return list(request.prompt)

    def _rows(self, index: int, request: Request, prompt: list[int]) -> list[list[Row]]:
        """A request's samples, in groups that fit in a batch and read their prompt together."""
        end_tokens = request.end_tokens | self._end_tokens
        rows = [
            Row(
                index,
                i,
                request.adapter,
                key,
                request.stops,
                prompt,
                end_tokens,
                ends_after=request.ends_after,
            )
            for i, key in enumerate(request.keys)
        ]
        return [rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows)]

    def _read(self, admitted: Sequence[Sequence[Row]]) -> RowCache:
        """Run each prompt through the model once, and draw the first token of each of its samples."""
        prompts = [rows[0].prompt for rows in admitted]
        longest, pad = max(map(len, prompts)), pad_token(self.tokenizer)
        ids = torch.full((len(prompts), longest), pad)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = True
        cache = RowCache(mask.to(self.device))
        logits = self._forward(ids.to(self.device), cache, [rows[0].adapter for rows in admitted])
        rows = list(chain.from_iterable(admitted))
        if len(rows) > len(admitted):
            sizes = torch.tensor([len(group) for group in admitted])
            group_of_row = torch.arange(len(admitted)).repeat_interleave(sizes).to(self.device)
            cache.repeat(group_of_row)
            logits = logits[group_of_row]
        self._draw(logits, rows)
        return cache

    def _step(self, live: Sequence[Row], cache: RowCache) -> None:
        cache.append_token()
        ids = torch.tensor([[row.tokens[-1]] for row in live], device=self.device)
        self._draw(self._forward(ids, cache, [row.adapter for row in live]), live)

    def _forward(self, ids: Tensor, cache: RowCache, adapters: Sequence[int]) -> Tensor:
        """Logits [B, V] after the last of `ids` [B, new]."""
        with self.route(adapters):
            return next_logits(self.model, ids, cache, parameters=self._parameters)

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> None:
        if self.adjust is not None:
            logits = self.adjust(logits, rows)
        tokens = self.sampling.choose(logits, [row.key for row in rows], [len(row.tokens) for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            self._stream(row.request, row.sample, row.tokens)

    def _ended(self, row: Row, report: Callable[[Generated], None]) -> bool:
        """Whether the row has ended; if so, it is reported."""
        at_end, full = row.tokens[-1] in row.end_tokens, len(row.tokens) >= self.max_new_tokens
        if row.ends_after is not None:
            at_end = at_end or row.ends_after(row.tokens)
        if not (at_end or full or self._may_hold_stop(row)):
            return False
        text = self.encoder.decode_after(row.prompt, without_end(row.tokens, row.end_tokens))
        positions = [text.find(stop) for stop in row.stops]
        cut = min((position for position in positions if position >= 0), default=None)
        ended: Ended
        if cut is not None:
            ended = "stop"
        elif at_end:
            ended = "end"
        elif full:
            ended = "length"
        else:  # the last tokens decode differently without those before
            return False
        report(Generated(row.request, row.sample, text[:cut], len(row.tokens), ended))
        if self.merging is not None:
            self.merging.note_length(len(row.tokens))
        return True

    def _may_hold_stop(self, row: Row) -> bool:
        """Whether the last tokens decode to a stop string; as a token has at least one byte, these few
        suffice.
        """
        if not row.stops:
            return False
        longest = max(len(stop.encode()) for stop in row.stops)
        tail = self.tokenizer.decode(row.tokens[-longest - 4 :])
        return any(stop in tail for stop in row.stops)


def complete(
    model: nn.Module,
    bank: AdapterBank,
    tokenizer: Any,
    *,
    requests: Sequence[tuple[str | Prompt, int]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy completions of (prompt, adapter id) requests, in order; -1 is the base model.

    The prompts are from a recipe: special tokens written in texts are tokens.
    """
    texts = [""] * len(requests)

    def store(generated: Generated) -> None:
        texts[generated.request] = generated.text

    greedy = Sampling(temperature=0.0, top_p=1.0, seed=0)
    decoder = Decoder(
        model,
        tokenizer,
        bank.routed,
        sampling=greedy,
        max_new_tokens=max_new_tokens,
        blocks=bank.blocks,
        merging=MergedDecoding(bank),
    )
    decoder.run([_greedy_request(prompt, adapter) for prompt, adapter in requests], store)
    return texts


def _greedy_request(prompt: str | Prompt, adapter: int) -> Request:
    if isinstance(prompt, str):
        prompt = Prompt(prompt)
    return Request(
        adapter,
        prompt.content,
        keys=("",),
        stops=prompt.stops,
        special_tokens=True,
        end_tokens=prompt.end_tokens,
    )


def end_tokens_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end tokens of the tokenizer and of the model's generation_config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if not isinstance(configured, list):
        configured = [configured]
    return frozenset(token for token in (tokenizer.eos_token_id, *configured) if isinstance(token, int))
