"""How do clips for many adapters become transcripts? In mixed batches; every clip is encoded once for all who share an encoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from flora_train.data.audio.features import ClipRef, FeatureStore
from flora_train.data.audio.speech_processor import NO_TIMESTAMPS
from flora_train.evaluation.generation import Blocks
from flora_train.models.loading import set_mode
from flora_train.models.speech_encoder import as_outputs, encode

Ended = Literal["end", "length", "loop"]


@dataclass(frozen=True)
class Request:
    """A clip for one adapter (-1: the base model). prompt: the decoder's first tokens; shares_encoding: the adapter leaves the
    encoder as it is."""

    adapter: int
    clip: ClipRef
    prompt: tuple[int, ...]
    shares_encoding: bool


@dataclass(frozen=True)
class DecodedClip:
    """ended: at the model's end token, at max_new_tokens, or where it began to repeat itself (the text is cut there)."""

    request: int
    text: str
    tokens: int
    ended: Ended


@dataclass
class _Row:
    """One request while it is decoded: its hypotheses, likeliest first, and those that have ended, with log-probability a token."""

    request: int
    adapter: int
    beams: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    ended: list[tuple[float, list[int]]] = field(default_factory=list)


class Transcriber:
    """An encoder-decoder of speech and the adapters on it.

    route: adapter ids of a batch's rows -> a context in which the model runs them; max_rows: hypotheses decoded at one time;
    blocks: adapter ids -> those that can be in one batch;
    beams: hypotheses a clip keeps (1: greedy). Timestamps and other special tokens are never written, nor what the model's own
    generation_config suppresses.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        route: Callable[[Sequence[int]], AbstractContextManager[Any]],
        store: FeatureStore,
        max_new_tokens: int,
        beams: int = 1,
        max_rows: int = 32,
        blocks: Blocks = lambda adapters: [frozenset(adapters)],
    ) -> None:
        self.blocks = blocks
        self.model, self.tokenizer, self.route, self.store = model, tokenizer, route, store
        self.max_new_tokens, self.beams, self.max_clips = max_new_tokens, beams, max(1, max_rows // beams)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.end = int(tokenizer.eos_token_id)
        own: Any = getattr(model, "generation_config", None)
        vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        self.never = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        self.never[_tokens(own, "suppress_tokens", vocabulary)] = True
        self.never[[i for i in tokenizer.all_special_ids if i < vocabulary]] = True
        if NO_TIMESTAMPS in tokenizer.get_vocab():  # Whisper: languages, tasks and timestamps stand behind the end token
            self.never[self.end + 1 :] = True
        self.never[self.end] = False
        self.not_first = self.never.clone()
        self.not_first[_tokens(own, "begin_suppress_tokens", vocabulary)] = True

    @torch.no_grad()
    def run(self, requests: Sequence[Request], report: Callable[[DecodedClip], None]) -> None:
        """Call `report` for every request, in batches of equal windows."""
        training = self.model.training
        self.model.eval()
        try:
            blocks = self.blocks({request.adapter for request in requests})
            batches = [batch for block in blocks for batch in self._batches(requests, block)]
            for i, batch in enumerate(batches):
                for coming in batches[i : i + 2]:
                    self.store.prefetch(dict.fromkeys(requests[request].clip for request in coming))
                self._transcribe(requests, batch, report)
        finally:
            set_mode(self.model, training)

    def _batches(self, requests: Sequence[Request], block: Collection[int]) -> Iterator[list[int]]:
        """Neighbours have the same clip; rows of one batch the same window, prompt length, and way to the encoder."""

        def kind(i: int) -> tuple[int, bool, int]:
            return -requests[i].clip.samples, requests[i].shares_encoding, len(requests[i].prompt)

        batch: list[int] = []
        mine = [i for i, request in enumerate(requests) if request.adapter in block]
        for i in sorted(mine, key=lambda i: (*kind(i), requests[i].clip.path, requests[i].adapter)):
            if batch and (kind(i) != kind(batch[0]) or len(batch) == self.max_clips):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _transcribe(self, requests: Sequence[Request], batch: list[int], report: Callable[[DecodedClip], None]) -> None:
        rows = [_Row(i, requests[i].adapter) for i in batch]
        hidden = self._encoded([requests[i] for i in batch])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.tensor([requests[i].prompt for i in batch], device=self.device)
        while rows:
            logits = self._forward(ids, hidden, cache, [row.adapter for row in rows for _ in row.beams])
            chosen = self._extend(rows, logits)
            staying = [i for i, row in enumerate(rows) if not self._ended(row, report)]
            rows, chosen = [rows[i] for i in staying], [chosen[i] for i in staying]
            if rows:
                places = [place for row in chosen for place in row]
                if places != list(range(len(logits))):  # it would copy all keys and values
                    cache.reorder_cache(torch.tensor(places, device=self.device))
                ids = torch.tensor([[beam[-1]] for row in rows for beam in row.beams], device=self.device)

    def _encoded(self, requests: Sequence[Request]) -> Tensor:
        """Encoder states of every request's clip, [B, positions, d]."""
        places = {clip: i for i, clip in enumerate(dict.fromkeys(request.clip for request in requests))}
        features = np.stack(self.store.get(list(places)))
        clips = torch.from_numpy(features).to(self.device).to(self.dtype)
        which = torch.tensor([places[request.clip] for request in requests], device=self.device)
        if requests[0].shares_encoding:
            return encode(self.model, clips)[which]
        with self.route([request.adapter for request in requests]):
            return encode(self.model, clips[which])

    def _forward(self, ids: Tensor, hidden: Tensor, cache: EncoderDecoderCache, adapters: Sequence[int]) -> Tensor:
        """Logits [B, V] after the last of `ids` [B, new]. The cache has the keys and values of `hidden` after the first call."""
        with self.route(adapters):
            found = self.model(
                encoder_outputs=as_outputs(hidden),
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
        return found.logits[:, -1].float()

    def _extend(self, rows: Sequence[_Row], logits: Tensor) -> list[list[int]]:
        """Give every row its next hypotheses; returns, per row, the cache rows that these go on from."""
        first = not rows[0].beams[0]
        likely = logits.masked_fill(self.not_first if first else self.never, -torch.inf).log_softmax(-1)
        best, tokens = (part.tolist() for part in likely.topk(min(2 * self.beams, likely.shape[1]), dim=1))
        chosen, start = [], 0
        for row in rows:
            found = [
                (score + gain, start + place, [*beam, token])
                for place, (beam, score) in enumerate(zip(row.beams, row.scores, strict=True))
                for gain, token in zip(best[start + place], tokens[start + place], strict=True)
            ]
            start += len(row.beams)
            found.sort(key=lambda one: -one[0])
            live: list[tuple[float, int, list[int]]] = []
            for rank, (score, place, beam) in enumerate(found):
                if beam[-1] == self.end:
                    if rank < self.beams:
                        row.ended.append((score / len(beam), beam[:-1]))
                elif len(live) < self.beams:
                    live.append((score, place, beam))
            row.scores, row.beams = [score for score, *_ in live], [beam for *_, beam in live]
            chosen.append([place for _, place, _ in live])
        return chosen

    def _ended(self, row: _Row, report: Callable[[DecodedClip], None]) -> bool:
        """Whether the row is done; it is reported then."""
        length, how, tokens = len(row.beams[0]), None, row.beams[0]
        if (loop := find_repetition(tokens)) is not None:
            how, tokens = "loop", tokens[:loop]
        elif row.ended and (self.beams == 1 or self._nothing_better_comes(row, length)):
            how, tokens = "end", max(row.ended)[1]
        elif length >= self.max_new_tokens:
            how, tokens = ("end", max(row.ended)[1]) if row.ended else ("length", tokens)
        if how is None:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        report(DecodedClip(row.request, text, length, how))  # type: ignore[arg-type]
        return True

    def _nothing_better_comes(self, row: _Row, length: int) -> bool:
        """Whether enough hypotheses have ended, and none that goes on is likelier, by token, than the worst of the best of them."""
        kept = sorted(row.ended, reverse=True)[: self.beams]
        return len(kept) == self.beams and kept[-1][0] >= row.scores[0] / length


def _tokens(settings: Any, key: str, vocabulary: int) -> list[int]:
    """The tokens that a generation_config lists, without what the model has no logits of."""
    listed = getattr(settings, key, None)
    return [token for token in listed if type(token) is int and 0 <= token < vocabulary] if isinstance(listed, list) else []


LONGEST, TIMES, LEAST = 24, 4, 16
"""A loop is a phrase of at most LONGEST tokens at the end of a text, TIMES or more in a row and LEAST tokens together."""


def find_repetition(tokens: Sequence[int]) -> int | None:
    """Where a loop at the end of `tokens` begins to repeat (after the phrase's first time), or None."""
    for size in range(1, LONGEST + 1):
        times = max(TIMES, -(-LEAST // size))
        if len(tokens) < size * times:
            break
        phrase = tokens[-size:]
        if all(list(tokens[len(tokens) - size * (i + 1) : len(tokens) - size * i]) == list(phrase) for i in range(times)):
            start = len(tokens) - size
            while start >= size and list(tokens[start - size : start]) == list(phrase):
                start -= size
            return start + size
    return None
