"""Tokenizes conversations: the tokens of a rendered template, and those that are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.data.chat.completeness import CompletenessCheck
from flora_train.data.chat.messages import Conversation
from flora_train.data.chat.positions import TokenPositions
from flora_train.data.chat.row_text import RowTokens, Span
from flora_train.data.chat.template import ChatTemplate, Form, Rendered, TemplateError
from flora_train.data.chat.turns import Learn, TurnFinder
from flora_train.data.documents import EncodedDocument
from flora_train.data.text_encoder import TextEncoder
from flora_train.data.token_cache import Encoded
from flora_train.data.tokenizer_copies import Place


@dataclass(frozen=True)
class EncodedConversation:
    """A tokenized conversation."""

    encoded: Encoded
    """Its first tokens, or all (`whole`)."""
    spans: tuple[Span, ...]
    """Positions of the tokens that are learnt, ascending, not touching each other. Some may lie behind the
    tokens that were made."""
    special: frozenset[int]
    """Special tokens of the tokenizer, which have no text."""
    first: int = 0
    """Tokens at the beginning that are left out: they would repeat the beginning-of-sequence token."""

    @property
    def length(self) -> int:
        """Tokens that were made of it."""
        return len(self.encoded.ids) - self.first

    @property
    def learns_all(self) -> bool:
        """Whether every token is learnt."""
        return self.spans == ((0, len(self.encoded.ids)),)

    def document(self, begin: int, end: int, head: Sequence[int] = ()) -> EncodedDocument:
        """Its tokens begin:end as a document. head: tokens that precede them there."""
        begin, end = begin + self.first, end + self.first
        inside = [(max(a, begin), min(b, end)) for a, b in self.spans if a < end and b > begin]
        first_predicted = begin if len(head) else begin + 1
        label_bytes = sum(self._bytes(max(a, first_predicted), b) for a, b in inside)
        tokens = np.concatenate([np.array(head, dtype=np.int32), self.encoded.ids[begin:end]])
        shift = len(head) - begin
        spans = [(a + shift, b + shift) for a, b in inside]
        return EncodedDocument(tokens.astype(np.int32), spans, label_bytes)

    def _bytes(self, begin: int, end: int) -> int:
        """UTF-8 bytes of the text of tokens; special tokens have none."""
        before = self.encoded.bytes_before
        covered = before(end) - before(begin) if end > begin else 0
        for at in range(begin, end):
            if int(self.encoded.ids[at]) in self.special:
                covered -= before(at + 1) - before(at)
        return covered


class ChatEncoder:
    """Tokenizes conversations as transformers' apply_chat_template does.

    special_tokens: special tokens that are written in rows are tokens as well; else they are text.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Any, special_tokens: bool = False) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.text = TextEncoder(tokenizer, special_tokens)
        self._row_tokens = RowTokens(self.text.special)
        self._turns = TurnFinder(template, self.text.special_pattern)
        self._beginnings: dict[tuple[Place, str], NDArray[np.int32]] = {}
        self.check_complete = CompletenessCheck(template)

    def document(self, conversation: Conversation, learn: Learn = "assistant") -> EncodedDocument:
        """A conversation and its learnt tokens. Raises ValueError with the reason if they cannot be told."""
        (encoded,) = self.encode([conversation], learn)
        if isinstance(encoded, ValueError):
            raise encoded
        return encoded.document(0, encoded.length)

    def prompt(self, conversation: Conversation) -> NDArray[np.int32]:
        """The tokens of a conversation and of the beginning of the assistant's next turn. Raises
        ValueError."""
        form, _ = self.template.first_rendering(conversation)
        text = self.template.render(conversation, prompt=True, form=form).text
        rows = self._rows(conversation, text, form, prompt=True)
        (encoded,) = self.text.encode([(text, rows)], more=True)
        return encoded.ids[self._repeated_start(encoded) :]

    def encode(
        self, conversations: Sequence[Conversation], learn: Learn, limit: int | None = None
    ) -> list[EncodedConversation | ValueError]:
        """Each conversation with its learnt tokens, or the reason why it has none.

        limit: number of tokens that are used, None for all.
        """
        prepared = [self._prepare(conversation) for conversation in conversations]
        texts = [(one.rendered.text, one.rows) for one in prepared if isinstance(one, _Prepared)]
        encoded = iter(self.text.encode(texts, limit=limit))
        results: list[EncodedConversation | ValueError] = []
        for conversation, one in zip(conversations, prepared, strict=True):
            if isinstance(one, ValueError):
                results.append(one)
                continue
            try:
                results.append(self._encoded(conversation, one, next(encoded), learn))
            except ValueError as error:
                results.append(error)
        return results

    def _prepare(self, conversation: Conversation) -> _Prepared | ValueError:
        try:
            form, rendered = self.template.first_rendering(conversation)
            self.check_complete(conversation, form)
            return _Prepared(form, rendered, self._rows(conversation, rendered.text, form))
        except ValueError as error:
            return error

    def _encoded(
        self, conversation: Conversation, prepared: _Prepared, encoded: Encoded, learn: Learn
    ) -> EncodedConversation:
        text, rows = prepared.rendered.text, prepared.rows
        positions = TokenPositions(self.text, text, rows, encoded, self._beginnings)
        spans = self._turns.learnt(conversation, prepared.form, prepared.rendered, positions, learn)
        special = frozenset(self.text.special)
        return EncodedConversation(encoded, tuple(spans), special, self._repeated_start(encoded))

    def _rows(self, conversation: Conversation, text: str, form: Form, prompt: bool = False) -> list[Span]:
        """The special tokens in a text that the row writes."""
        if not self._row_tokens.written(conversation):
            return []
        try:
            return self._row_tokens.spans(conversation, text, self.template, prompt=prompt, form=form)
        except TemplateError:
            if self.text.special_tokens:  # they are tokens wherever they are written
                return []
            raise

    def start_of(self, encoded: EncodedConversation) -> list[int]:
        """The start tokens with which a conversation begins, or none."""
        start = self.text.start
        ids = encoded.encoded.ids[encoded.first :]
        return list(start) if start and ids[: len(start)].tolist() == start else []

    def _repeated_start(self, encoded: Encoded) -> int:
        """Tokens at the beginning that the start tokens repeat: a text begins with them once."""
        start, ids = self.text.start, encoded.ids
        size, first = len(start), 0
        while start and ids[first : first + 2 * size].tolist() == [*start, *start]:
            first += size
        return first


@dataclass(frozen=True)
class _Prepared:
    """A conversation that is rendered."""

    form: Form
    rendered: Rendered
    rows: list[Span]
