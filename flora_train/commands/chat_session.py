"""Conversations with the base and with adapters, whose answers to one text are generated in one batch."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

from flora_train.adapters.bank import AdapterBank
from flora_train.commands.chat_display import Answer, Display
from flora_train.commands.chat_prompts import Message, Prompter
from flora_train.config.errors import user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.evaluation.generation import Decoder, Generated, MergedDecoding, Request, Sampling
from flora_train.evaluation.generation.context_limit import context_length
from flora_train.evaluation.generation.streaming import TextStream
from flora_train.models.probe_inputs import count_tokens

REFRESH = 0.08
"""Seconds between two updates of the display."""


@dataclass
class Contender:
    """The base or an adapter, and what was said to it and by it."""

    name: str
    adapter: int
    prompter: Prompter
    history: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How answers are generated."""

    sampling: Sampling
    max_new_tokens: int


class Stopped(Exception):
    """The user has stopped the generation."""


class ChatSession:
    """Conversations with the contenders of one run."""

    def __init__(
        self,
        bank: AdapterBank,
        tokenizer: Any,
        contenders: Mapping[str, Contender],
        *,
        model: ModelConfig,
        settings: Settings,
    ) -> None:
        self.bank, self.tokenizer, self.contenders = bank, tokenizer, contenders
        self.model_config, self.settings = model, settings
        self.merging = MergedDecoding(bank)
        self.chosen: list[str] = list(contenders)
        """Names of those who answer."""

    def choose(self, names: Sequence[str]) -> None:
        """Let these contenders answer from now on."""
        self.chosen = list(names)

    def reset(self) -> None:
        """Forget all conversations."""
        for contender in self.contenders.values():
            contender.history.clear()

    def say(self, text: str, display: Display, *, stoppable: bool) -> list[str]:
        """Generate and show the answers to a text; returns notes on them.

        stoppable: Ctrl-C stops the generation. Raises UserError if a conversation leaves no room for an
        answer, or the template cannot render it.
        """
        chosen = [self.contenders[name] for name in self.chosen]
        message = {"role": "user", "content": text}
        prompts = [contender.prompter.prompt([*contender.history, message]) for contender in chosen]
        self._check_tokens(prompts)
        max_new_tokens = self._room(chosen, prompts)
        turn = _Turn(self, chosen, prompts, display=display)
        with stop_requests(stoppable) as is_stopped:
            turn.generate(max_new_tokens, is_stopped)
        for contender, answer in zip(chosen, turn.answers, strict=True):
            if answer.text or answer.ended:
                contender.history += [message, {"role": "assistant", "content": answer.text}]
        return self._notes(chosen, turn, max_new_tokens)

    def _check_tokens(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UserError if the model has no embedding of a token."""
        largest, known = max(map(max, prompts)), count_tokens(self.bank.model)
        if largest >= known:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            hint = f"has the id {largest}, and the model's tokens are 0 to {known - 1}: choose another one"
            raise user_error("--chat-template", token, hint)

    def _room(self, chosen: Sequence[Contender], prompts: Sequence[Sequence[int]]) -> int:
        """Tokens of an answer that fit after all prompts. Raises UserError if there are none."""
        number = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        longest = len(prompts[number])
        limit = self._context_length
        if limit is None or longest + self.settings.max_new_tokens <= limit:
            return self.settings.max_new_tokens
        if longest >= limit:
            advice = "/reset begins a new one"
            if not chosen[number].history:
                advice = "shorten the text"
            hint = f"has {longest:,} tokens, and the model reads at most {limit:,}: {advice}"
            raise user_error(f"the conversation with {chosen[number].name}", None, hint)
        return limit - longest

    @cached_property
    def _context_length(self) -> int | None:
        return context_length(self.model_config, self.bank.model.config)

    def _notes(self, chosen: Sequence[Contender], turn: _Turn, max_new_tokens: int) -> list[str]:
        """Why answers end before their end."""
        notes = []
        cut = [contender.name for contender, at in zip(chosen, turn.ends, strict=True) if at == "length"]
        if cut and max_new_tokens < self.settings.max_new_tokens:
            notes.append(
                f"{', '.join(cut)}: cut off, the model's context is full; /reset begins a new conversation"
            )
        elif cut:
            notes.append(f"{', '.join(cut)}: cut off at {max_new_tokens:,} tokens (--max-new-tokens)")
        if turn.stopped:
            notes.append("stopped")
        return notes


class _Turn:
    """The answers to one text while they are generated."""

    def __init__(
        self,
        session: ChatSession,
        chosen: Sequence[Contender],
        prompts: Sequence[Sequence[int]],
        *,
        display: Display,
    ) -> None:
        self.session, self.chosen, self.prompts, self.display = session, chosen, prompts, display
        self.answers = [Answer() for _ in chosen]
        self.ends: list[str] = [""] * len(chosen)
        self.stopped = False
        self._tokens: list[Sequence[int]] = [()] * len(chosen)
        self._shown_at = 0.0

    def generate(self, max_new_tokens: int, is_stopped: Callable[[], bool]) -> None:
        """Generate all answers in one batch."""
        bank, settings = self.session.bank, self.session.settings
        decoder = Decoder(
            bank.model,
            self.session.tokenizer,
            bank.routed,
            sampling=settings.sampling,
            max_new_tokens=max_new_tokens,
            blocks=bank.blocks,
            merging=self.session.merging,
        )
        self._streams = [
            TextStream(decoder.encoder, prompt, contender.prompter.stops)
            for contender, prompt in zip(self.chosen, self.prompts, strict=True)
        ]

        def stream(request: int, sample: int, tokens: Sequence[int]) -> None:
            self._tokens[request] = tokens
            if is_stopped():
                raise Stopped
            if time.monotonic() - self._shown_at >= REFRESH:
                self._show()

        try:
            decoder.run(list(self._requests()), self._finish, stream)
        except Stopped:
            self.stopped = True
            self._show()
        finally:
            self.display.close()

    def _requests(self) -> Iterator[Request]:
        for contender, prompt in zip(self.chosen, self.prompts, strict=True):
            # the same draws for all, and for the same conversation again, whoever else answers
            key = f"message {len(contender.history)}"
            yield Request(
                contender.adapter,
                tuple(prompt),
                (key,),
                stops=contender.prompter.stops,
                end_tokens=contender.prompter.end_tokens,
            )

    def _finish(self, generated: Generated) -> None:
        number = generated.request
        self._streams[number].finish(generated.text)
        self.answers[number] = Answer(generated.text, ended=True)
        self.ends[number] = generated.ended
        self._show()

    def _show(self) -> None:
        """Update the display with the tokens so far."""
        for number, stream in enumerate(self._streams):
            if not self.answers[number].ended:
                end_tokens = self.chosen[number].prompter.end_tokens
                tokens = [token for token in self._tokens[number] if token not in end_tokens]
                stream.update(tokens)
                self.answers[number] = Answer(stream.text)
        names = [contender.name for contender in self.chosen]
        self.display.update(dict(zip(names, self.answers, strict=True)))
        self._shown_at = time.monotonic()


@contextmanager
def stop_requests(enabled: bool) -> Iterator[Callable[[], bool]]:
    """A context in which a first Ctrl-C is noted, for the generation to stop after its token; a second one
    raises KeyboardInterrupt. Gives a function that tells whether there was one."""
    requested = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True

    if not enabled:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)
