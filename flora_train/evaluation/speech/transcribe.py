"""Transcribes clips with many adapters in mixed batches; adapters that share an encoder also share its
output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from flora_train.data.audio.features import ClipRef, FeatureStore
from flora_train.data.audio.speech_processor import NO_TIMESTAMPS
from flora_train.evaluation.generation import Blocks
from flora_train.models.loading import set_mode
from flora_train.models.speech_encoder import as_encoder_outputs, encode

Ended = Literal["end", "length", "loop"]

MAX_PHRASE, MIN_TIMES, MIN_TOKENS = 24, 4, 16
"""A repetition is a phrase of at most MAX_PHRASE tokens, MIN_TIMES or more in a row and MIN_TOKENS in total.
"""


@dataclass(frozen=True)
class Request:
    """A clip to be transcribed by one adapter."""

    adapter: int
    """The adapter's id; -1 is the base model."""
    clip: ClipRef
    prompt: tuple[int, ...]
    """The decoder's first tokens."""
    shares_encoding: bool
    """Whether the adapter leaves the encoder unchanged."""


@dataclass(frozen=True)
class DecodedClip:
    """The text decoded for one request."""

    request: int
    text: str
    tokens: int
    """Number of tokens decoded."""
    ended: Ended
    """At the model's end token, at max_new_tokens, or at a repetition, where the text is cut."""


@dataclass
class _Row:
    """A request while it is decoded."""

    request: int
    adapter: int
    beams: list[list[int]] = field(default_factory=lambda: [[]])
    """Open hypotheses, the likeliest first."""
    scores: list[float] = field(default_factory=lambda: [0.0])
    """Log-probability of each open hypothesis."""
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    """Ended hypotheses with their log-probability per token."""


class Transcriber:
    """Decodes requests with an encoder-decoder model of speech and its adapters.

    Timestamps, other special tokens, and tokens that the model's generation_config suppresses are never
    written.

    route: maps the adapter ids of a batch's rows to a context in which the model applies them.
    beams: hypotheses per clip (1: greedy).
    max_rows: hypotheses decoded at the same time.
    blocks: splits adapter ids into groups that fit in one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        route: Callable[[Sequence[int]], AbstractContextManager[Any]],
        *,
        store: FeatureStore,
        max_new_tokens: int,
        beams: int = 1,
        max_rows: int = 32,
        blocks: Blocks = lambda adapters: [frozenset(adapters)],
    ) -> None:
        self.model, self.tokenizer, self.route, self.store, self.blocks = (
            model,
            tokenizer,
            route,
            store,
            blocks,
        )
        self.max_new_tokens, self.beams, self.max_clips = max_new_tokens, beams, max(1, max_rows // beams)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.end = int(tokenizer.eos_token_id)
        self.never, self.not_first = self._suppressed_tokens()

    @torch.no_grad()
    def run(self, requests: Sequence[Request], report: Callable[[DecodedClip], None]) -> None:
        """Call `report` for every request, in batches of clips with equal windows."""
        training = self.model.training
        self.model.eval()
        try:
            blocks = self.blocks({request.adapter for request in requests})
            batches = list(chain.from_iterable(self._batches(requests, block) for block in blocks))
            for i, batch in enumerate(batches):
                for upcoming in batches[i : i + 2]:
                    self.store.prefetch(dict.fromkeys(requests[request].clip for request in upcoming))
                self._transcribe(requests, batch, report)
        finally:
            set_mode(self.model, training)

    def _suppressed_tokens(self) -> tuple[Tensor, Tensor]:
        """Masks over the vocabulary: tokens that are never written, and tokens that are not written first."""
        generation_config = getattr(self.model, "generation_config", None)
        vocabulary = int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        never = torch.zeros(vocabulary, dtype=torch.bool, device=self.device)
        never[_listed_tokens(generation_config, "suppress_tokens", vocabulary)] = True
        never[[i for i in self.tokenizer.all_special_ids if i < vocabulary]] = True
        # Whisper's languages, tasks and timestamps have ids above its end token
        if NO_TIMESTAMPS in self.tokenizer.get_vocab():
            never[self.end + 1 :] = True
        never[self.end] = False
        not_first = never.clone()
        not_first[_listed_tokens(generation_config, "begin_suppress_tokens", vocabulary)] = True
        return never, not_first

    def _batches(self, requests: Sequence[Request], block: Collection[int]) -> Iterator[list[int]]:
        """Batches of requests with the same window, prompt length and use of the encoder; equal clips are
        neighbours.
        """

        def shape(i: int) -> tuple[int, bool, int]:
            return -requests[i].clip.samples, requests[i].shares_encoding, len(requests[i].prompt)

        batch: list[int] = []
        in_block = [i for i, request in enumerate(requests) if request.adapter in block]
        for i in sorted(in_block, key=lambda i: (*shape(i), requests[i].clip.path, requests[i].adapter)):
            if batch and (shape(i) != shape(batch[0]) or len(batch) == self.max_clips):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _transcribe(
        self, requests: Sequence[Request], batch: list[int], report: Callable[[DecodedClip], None]
    ) -> None:
        rows = [_Row(i, requests[i].adapter) for i in batch]
        hidden = self._encoded([requests[i] for i in batch])
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        ids = torch.tensor([requests[i].prompt for i in batch], device=self.device)
        while rows:
            adapters = chain.from_iterable([row.adapter] * len(row.beams) for row in rows)
            logits = self._forward(ids, hidden, cache, adapters=list(adapters))
            origins = self._extend(rows, logits)
            open_rows = [i for i, row in enumerate(rows) if not self._ended(row, report)]
            rows = [rows[i] for i in open_rows]
            if rows:
                order = list(chain.from_iterable(origins[i] for i in open_rows))
                if order != list(range(len(logits))):  # reordering copies all keys and values
                    cache.reorder_cache(torch.tensor(order, device=self.device))
                beams = chain.from_iterable(row.beams for row in rows)
                ids = torch.tensor([[beam[-1]] for beam in beams], device=self.device)

    def _encoded(self, requests: Sequence[Request]) -> Tensor:
        """Encoder states of every request's clip, [B, positions, d]."""
        clips_used = dict.fromkeys(request.clip for request in requests)
        clip_index = {clip: i for i, clip in enumerate(clips_used)}
        features = np.stack(self.store.get(list(clip_index)))
        clips = torch.from_numpy(features).to(self.device).to(self.dtype)
        clip_of_row = torch.tensor([clip_index[request.clip] for request in requests], device=self.device)
        if requests[0].shares_encoding:
            return encode(self.model, clips)[clip_of_row]
        with self.route([request.adapter for request in requests]):
            return encode(self.model, clips[clip_of_row])

    def _forward(
        self, ids: Tensor, hidden: Tensor, cache: EncoderDecoderCache, *, adapters: Sequence[int]
    ) -> Tensor:
        """Logits [B, V] after the last of `ids` [B, new].

        The first call stores the keys and values of `hidden`.
        """
        with self.route(adapters):
            output = self.model(
                encoder_outputs=as_encoder_outputs(hidden),
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            )
        return output.logits[:, -1].float()

    def _extend(self, rows: Sequence[_Row], logits: Tensor) -> list[list[int]]:
        """Extend every row's hypotheses by a token; returns the cache rows that the new ones continue."""
        at_first_token = not rows[0].beams[0]
        suppressed = self.not_first if at_first_token else self.never
        log_probabilities = logits.masked_fill(suppressed, -torch.inf).log_softmax(-1)
        count = min(2 * self.beams, log_probabilities.shape[1])
        best, tokens = (part.tolist() for part in log_probabilities.topk(count, dim=1))
        origins, start = [], 0
        for row in rows:
            candidates = []
            for i, (beam, score) in enumerate(zip(row.beams, row.scores, strict=True)):
                for gain, token in zip(best[start + i], tokens[start + i], strict=True):
                    candidates.append((score + gain, start + i, [*beam, token]))
            start += len(row.beams)
            origins.append(self._select(row, candidates))
        return origins

    def _select(self, row: _Row, candidates: list[tuple[float, int, list[int]]]) -> list[int]:
        """Keep a row's best candidates (score, cache row, tokens); returns the cache rows of those still
        open.
        """
        candidates.sort(key=lambda candidate: -candidate[0])
        selected: list[tuple[float, int, list[int]]] = []
        for rank, (score, origin, beam) in enumerate(candidates):
            if beam[-1] == self.end:
                if rank < self.beams:
                    row.ended.append((score / len(beam), beam[:-1]))
            elif len(selected) < self.beams:
                selected.append((score, origin, beam))
        row.scores = [score for score, _, _ in selected]
        row.beams = [beam for _, _, beam in selected]
        return [origin for _, origin, _ in selected]

    def _ended(self, row: _Row, report: Callable[[DecodedClip], None]) -> bool:
        """Whether the row has ended; if so, it is reported."""
        length, tokens = len(row.beams[0]), row.beams[0]
        ended: Ended
        if (repetition := find_repetition(tokens)) is not None:
            ended, tokens = "loop", tokens[:repetition]
        elif row.ended and (
            self.beams == 1 or length >= self.max_new_tokens or self._is_settled(row, length)
        ):
            ended, tokens = "end", max(row.ended)[1]
        elif length >= self.max_new_tokens:
            ended = "length"
        else:
            return False
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        report(DecodedClip(row.request, text, length, ended))
        return True

    def _is_settled(self, row: _Row, length: int) -> bool:
        """Whether the ended hypotheses suffice and no open one is likelier per token than their worst."""
        best = sorted(row.ended, reverse=True)[: self.beams]
        return len(best) == self.beams and best[-1][0] >= row.scores[0] / length


def find_repetition(tokens: Sequence[int]) -> int | None:
    """The position at which a phrase repeated up to the end of `tokens` first repeats, or None."""
    for size in range(1, MAX_PHRASE + 1):
        times = max(MIN_TIMES, -(-MIN_TOKENS // size))
        if len(tokens) < size * times:
            break
        phrase = list(tokens[-size:])
        if list(tokens[-size * times :]) == phrase * times:
            start = len(tokens) - size
            while start >= size and list(tokens[start - size : start]) == phrase:
                start -= size
            return start + size
    return None


def _listed_tokens(generation_config: Any, key: str, vocabulary: int) -> list[int]:
    """The tokens listed under a key of a generation_config, without those outside the model's vocabulary."""
    listed = getattr(generation_config, key, None)
    if not isinstance(listed, list):
        return []
    return [token for token in listed if type(token) is int and 0 <= token < vocabulary]
