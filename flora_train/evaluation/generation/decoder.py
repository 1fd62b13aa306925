"""How do many prompts for many adapters become texts? In one batch that is kept full, each row leaving when it is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.tokenization import pad_token
from flora_train.evaluation.generation.attention import decoding_attention
from flora_train.evaluation.generation.batching_mode import BatchingMode, batching_mode, read, takes_of, write_row
from flora_train.evaluation.generation.context_limit import check_room
from flora_train.evaluation.generation.kv_cache import RowCache
from flora_train.evaluation.generation.sampling import Sampling
from flora_train.models.loading import set_mode

Ended = Literal["stop", "end", "length"]
Blocks = Callable[[Iterable[int]], Sequence[Collection[int]]]
REFILL = 0.75
"""New rows are read in when the batch is no fuller than this: one prompt at a time would cost a pass over the base each."""


@dataclass(frozen=True)
class Request:
    """A prompt for one adapter (-1: the base model). keys: one name a sample, of which its draws depend; stops: a text ends
    before the first of these strings in it; special_tokens: those written in the prompt are tokens (a recipe's prompt), else text."""

    adapter: int
    prompt: str
    keys: tuple[str, ...]
    stops: tuple[str, ...] = ()
    special_tokens: bool = False


@dataclass(frozen=True)
class Generated:
    """One sample. ended: at a stop string, at the model's end token, or at max_new_tokens; tokens: that were computed."""

    request: int
    sample: int
    text: str
    tokens: int
    ended: Ended


@dataclass
class _Row:
    request: int
    sample: int
    adapter: int
    key: str
    stops: tuple[str, ...]
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)


class Decoder:
    """A causal model, the adapters on it, and how to draw.

    route: adapter ids of a batch's rows -> a context in which the model runs them (`bank.routed`; a null context for a model
    without a bank); max_rows: rows decoded at one time; blocks: adapter ids -> those that can be in one batch (`bank.blocks`).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        route: Callable[[Sequence[int]], AbstractContextManager[Any]],
        sampling: Sampling,
        max_new_tokens: int,
        max_rows: int = 32,
        blocks: Blocks = lambda adapters: [frozenset(adapters)],
    ) -> None:
        self.blocks = blocks
        self.model, self.tokenizer, self.route, self.sampling = model, tokenizer, route, sampling
        self.encoder = TextEncoder(tokenizer)
        self.max_new_tokens, self.max_rows = max_new_tokens, max_rows
        self.device = next(model.parameters()).device
        self._takes = takes_of(model)
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        self._ends = {tokenizer.eos_token_id, *(token for token in listed if isinstance(token, int))} - {None}

    @torch.no_grad()
    def run(self, requests: Sequence[Request], report: Callable[[Generated], None]) -> None:
        """Call `report` for every sample of every request, as they end. Longest prompts first. Raises UserError if a prompt and
        its continuation are longer than the model can read."""
        prompts = [self.encoder.prompt(r.prompt, r.special_tokens) for r in requests]
        check_room(self.model.config, max(map(len, prompts), default=0), self.max_new_tokens)
        order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))
        training = self.model.training
        self.model.eval()
        try:
            for block in self.blocks({request.adapter for request in requests}):
                part = [i for i in order if requests[i].adapter in block]
                self._decode(deque(rows for i in part for rows in self._rows(i, requests[i], prompts[i])), report)
        finally:
            set_mode(self.model, training)

    def _decode(self, waiting: deque[list[_Row]], report: Callable[[Generated], None]) -> None:
        mode = batching_mode(self.model)
        if mode != "batched":
            for row in (row for rows in waiting for row in rows):
                self._write_single_row(mode, row, report)
            return
        live: list[_Row] = []
        cache: RowCache | None = None
        with decoding_attention(self.model):
            while waiting or live:
                if entering := self._entering(waiting, len(live)):
                    new = self._read(entering)
                    live += [row for rows in entering for row in rows]
                    if cache is None:
                        cache = new
                    else:
                        cache.join(new)
                elif cache is not None:
                    self._step(live, cache)
                ended = [i for i, row in enumerate(live) if self._ended(row, report)]
                if ended and cache is not None:
                    live = [live[i] for i in cache.drop(ended)]
                    cache = cache if live else None

    def _write_single_row(self, mode: BatchingMode, row: _Row, report: Callable[[Generated], None]) -> None:
        def choose(logits: Tensor) -> int:
            self._draw(logits, [row])
            return row.tokens[-1]

        with self.route([row.adapter]):
            write_row(self.model, mode, row.prompt, choose, lambda: self._ended(row, report), self.max_new_tokens)

    def _entering(self, waiting: deque[list[_Row]], live: int) -> list[list[_Row]]:
        """Who is read in now: nobody while the batch is rather full, else as many as fit."""
        entering: list[list[_Row]] = []
        room = self.max_rows - live if live <= REFILL * self.max_rows else 0
        while waiting and len(waiting[0]) <= room:
            room -= len(waiting[0])
            entering.append(waiting.popleft())
        return entering

    def _rows(self, index: int, request: Request, prompt: list[int]) -> list[list[_Row]]:
        """A request's samples, in groups that share the reading of their prompt and fit into a batch."""
        rows = [_Row(index, i, request.adapter, key, request.stops, prompt) for i, key in enumerate(request.keys)]
        return [rows[i : i + self.max_rows] for i in range(0, len(rows), self.max_rows)]

    def _read(self, entering: Sequence[Sequence[_Row]]) -> RowCache:
        """Run prompts through the model, each once, and draw the first token of every sample."""
        prompts = [rows[0].prompt for rows in entering]
        longest, pad = max(map(len, prompts)), pad_token(self.tokenizer)
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device).bool()
        cache = RowCache(mask)
        logits = self._forward(ids, cache, [rows[0].adapter for rows in entering])
        copies = [i for i, rows in enumerate(entering) for _ in rows]
        rows = [row for group in entering for row in group]
        if len(rows) > len(entering):
            repeated = torch.tensor(copies, device=self.device)
            cache.repeat(repeated)
            logits = logits[repeated]
        self._draw(logits, rows)
        return cache

    def _step(self, live: Sequence[_Row], cache: RowCache) -> None:
        cache.append_token()
        ids = torch.tensor([[row.tokens[-1]] for row in live], device=self.device)
        self._draw(self._forward(ids, cache, [row.adapter for row in live]), live)

    def _forward(self, ids: Tensor, cache: RowCache, adapters: Sequence[int]) -> Tensor:
        """Logits [B, V] after the last of `ids` [B, new]."""
        with self.route(adapters):
            return read(self.model, ids, cache, self._takes)

    def _draw(self, logits: Tensor, rows: Sequence[_Row]) -> None:
        tokens = self.sampling.choose(logits, [row.key for row in rows], [len(row.tokens) for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)

    def _ended(self, row: _Row, report: Callable[[Generated], None]) -> bool:
        """Whether the row is done; it is reported then."""
        at_end, full = row.tokens[-1] in self._ends, len(row.tokens) >= self.max_new_tokens
        if not (at_end or full or self._stop_in_sight(row)):
            return False
        text = self.encoder.decode_after(row.prompt, row.tokens)
        cut = min((at for stop in row.stops if (at := text.find(stop)) >= 0), default=None)
        if cut is None and not (at_end or full):  # the tail alone decoded to what the whole does not say
            return False
        ended: Ended = "stop" if cut is not None else "end" if at_end else "length"
        report(Generated(row.request, row.sample, text[:cut], len(row.tokens), ended))
        return True

    def _stop_in_sight(self, row: _Row) -> bool:
        """Whether the end of the text holds a stop string: a token stands for a byte at least."""
        if not row.stops:
            return False
        tail = self.tokenizer.decode(row.tokens[-max(len(stop.encode()) for stop in row.stops) - 4 :])
        return any(stop in tail for stop in row.stops)


def complete(
    model: nn.Module, bank: AdapterBank, tokenizer: Any, requests: Sequence[tuple[str, int]], max_new_tokens: int
) -> list[str]:
    """Greedy completions of (prompt, adapter id) requests, in their order; -1 is the base model. The prompts are a recipe's: special
    tokens in them are tokens."""
    texts = [""] * len(requests)

    def keep(generated: Generated) -> None:
        texts[generated.request] = generated.text

    decoder = Decoder(model, tokenizer, bank.routed, Sampling(0.0, 1.0, 0), max_new_tokens, blocks=bank.blocks)
    decoder.run([Request(adapter, prompt, ("",), special_tokens=True) for prompt, adapter in requests], keep)
    return texts
