"""Finds the learnt tokens of a conversation: by the marks of its template, or by rendering its beginnings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from flora_train.data.chat.messages import Conversation
from flora_train.data.chat.positions import TokenPositions
from flora_train.data.chat.template import ChatTemplate, Form, Rendered, TemplateError

Learn = Literal["assistant", "last", "all"]
Span = tuple[int, int]
MARKED_FIX = "use a chat_template that marks what is learnt with {% generation %}"
TEMPLATE_FIX = f"use learn: last, or {MARKED_FIX.removeprefix('use ')}"


class TurnFinder:
    """Finds the tokens of conversations that are learnt.

    Every boundary of a span that no mark of the template gives is proved: what the template renders of the
    messages before it, and its tokens, begin those of the whole conversation.
    """

    def __init__(self, template: ChatTemplate, closing: re.Pattern[str]) -> None:
        """closing: matches the special tokens of the tokenizer, with which a turn may end."""
        self.template = template
        self._closing = re.compile(rf"(?:\s|{closing.pattern})*")
        self._special = closing

    def learnt(
        self, conversation: Conversation, form: Form, rendered: Rendered, tokens: TokenPositions, learn: Learn
    ) -> list[Span]:
        """The spans of tokens that are learnt, ascending. Raises ValueError with the reason if they cannot be
        told."""
        if learn == "all":
            return self._all(conversation, form, rendered, tokens)
        wanted = conversation.assistant_turns
        if learn == "last":
            wanted = wanted[-1:]
        wanted = [position for position in wanted if conversation.may_learn(position)]
        if not wanted:
            return []
        if self.template.marks_turns(conversation):
            return _joined(self._marked(conversation, form, rendered, tokens, wanted))
        return _joined([self._turn(conversation, form, rendered.text, tokens, i) for i in wanted])

    def _all(
        self, conversation: Conversation, form: Form, rendered: Rendered, tokens: TokenPositions
    ) -> list[Span]:
        """Everything but the messages that are not selected."""
        spans: list[Span] = []
        begin = 0
        for position in range(len(conversation.messages)):
            if conversation.may_learn(position):
                continue
            first = self._message_end(conversation, form, rendered.text, tokens, position - 1)
            spans.append((begin, first))
            begin = self._message_end(conversation, form, rendered.text, tokens, position)
        return _joined([*spans, (begin, tokens.count)])

    def _marked(
        self,
        conversation: Conversation,
        form: Form,
        rendered: Rendered,
        tokens: TokenPositions,
        wanted: Sequence[int],
    ) -> list[Span]:
        """The marked tokens of the wanted turns."""
        by_turn = self._marks_of_turns(conversation, form, rendered)
        spans: list[Span] = []
        for position in wanted:
            marks = [(begin, end) for begin, end in by_turn.get(position, ()) if begin < end]
            if not marks:
                raise ValueError(
                    f"{self.template.name} marks nothing of message {position + 1} with {{% generation %}}: "
                    "mark every turn of the assistant, or leave out all marks"
                )
            found = [tokens.covering(begin, end) for begin, end in marks]
            if None in found:
                raise ValueError(_merged(position, self.template.name))
            turn = [span for span in found if span is not None]
            turn[-1] = (turn[-1][0], self._with_end_token(tokens, *turn[-1]))
            spans += turn
        return spans

    def _with_end_token(self, tokens: TokenPositions, begin: int, end: int) -> int:
        """The end of a turn with its end token, which some templates write after their mark."""
        last = end - 1
        while last >= begin and not tokens.text_of(last).strip():
            last -= 1
        if tokens.is_special(last) or not tokens.is_special(end):
            return end
        return end + 1

    def _marks_of_turns(
        self, conversation: Conversation, form: Form, rendered: Rendered
    ) -> dict[int, list[Span]]:
        """Position of an assistant's message -> its marks."""
        turns = conversation.assistant_turns
        if len(turns) == len(rendered.marks):
            return {turn: [mark] for turn, mark in zip(turns, rendered.marks, strict=True)}
        begins = []
        for turn in turns:
            before = ""
            if turn > 0:
                before = self.template.render(conversation.before(turn), form=form).text
            begins.append(self._shared(before, rendered.text))
        marks: dict[int, list[Span]] = {}
        for mark in rendered.marks:
            turn = max((i for i, begin in enumerate(begins) if begin <= mark[0]), default=0)
            marks.setdefault(turns[turn], []).append(mark)
        return marks

    def _turn(
        self, conversation: Conversation, form: Form, text: str, tokens: TokenPositions, position: int
    ) -> Span:
        """The tokens of an assistant's turn, from after the generation prompt to its end."""
        begin = self._turn_begin(conversation, form, text, position)
        first = tokens.exact(begin)
        if first is None:
            in_template = text[begin - 1 : begin].isspace() and not text[begin : begin + 1].isspace()
            raise ValueError(_merged(position, self.template.name, in_template=in_template))
        return first, self._message_end(conversation, form, text, tokens, position, begin)

    def _turn_begin(self, conversation: Conversation, form: Form, text: str, position: int) -> int:
        """The character at which an assistant's turn begins, after the generation prompt."""
        before = conversation.before(position)
        try:
            with_prompt = self.template.render(before, prompt=True, form=form).text
        except TemplateError:
            if position > 0:
                raise
            return self._first_turn_begin(conversation, form, text)
        if not text.startswith(with_prompt):
            if position == 0:
                return self._first_turn_begin(conversation, form, text)
            raise ValueError(self._no_prefix(conversation, form, text, position, with_prompt))
        content = str(conversation.messages[position].get("content") or "").strip()
        if content and not text[len(with_prompt) :].lstrip().startswith(content):
            without = self.template.render(before, form=form).text if position else ""
            if without == with_prompt:
                raise ValueError(
                    f"{self.template.name} writes no generation prompt (add_generation_prompt), so that it "
                    f"is not known where the text of message {position + 1} begins: {MARKED_FIX}"
                )
        return len(with_prompt)

    def _first_turn_begin(self, conversation: Conversation, form: Form, text: str) -> int:
        """The same of a conversation that the assistant begins, where a template needs a first message."""
        first = conversation.before(1)
        without = self.template.render(first, form=form).text
        with_prompt = self.template.render(first, prompt=True, form=form).text
        prompt = with_prompt[len(without) :]
        content = str(first.messages[0].get("content") or "").strip()
        at = text.find(prompt) + len(prompt)
        is_plain = bool(prompt and content and with_prompt.startswith(without) and at >= len(prompt))
        if is_plain and text[at:].lstrip().startswith(content):
            return at
        raise ValueError(
            f"{self.template.name} cannot tell where the first message begins, which is the assistant's: "
            "begin with a message of the user, or give that message weight: 0"
        )

    def _message_end(
        self,
        conversation: Conversation,
        form: Form,
        text: str,
        tokens: TokenPositions,
        position: int,
        begin: int = 0,
    ) -> int:
        """The number of tokens up to the end of a message, -1: before the first."""
        if position < 0:
            return 0
        if position == len(conversation.messages) - 1:
            return tokens.until(len(text))
        rendered = self.template.render(conversation.before(position + 1), form=form).text
        end = self._shared(rendered, text)
        if end < begin or self._closing.fullmatch(rendered, end) is None:
            raise ValueError(
                f"{self.template.name} renders message {position + 1} in another way when other messages "
                "follow it (some templates drop earlier reasoning), so that what is learnt of it cannot be "
                f"told: {TEMPLATE_FIX}"
            )
        exact = tokens.exact(end)
        if exact is None:  # what follows the end token may be one token with the next message
            after = tokens.after_special(begin, end)
            end = end if after is None else after
            exact = tokens.exact(end)
        if exact is None:
            raise ValueError(_merged(position, self.template.name, "end"))
        return min(exact, tokens.until(end))

    def _shared(self, beginning: str, text: str) -> int:
        """Characters that a text shares with a beginning of it, up to a special token that differs."""
        if text.startswith(beginning):
            return len(beginning)
        pairs = enumerate(zip(beginning, text, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(beginning), len(text)))
        for match in self._special.finditer(beginning):
            if match.start() < shared < match.end():
                return match.start()
        for match in self._special.finditer(text):
            if match.start() < shared < match.end():
                return match.start()
        return shared

    def _no_prefix(
        self, conversation: Conversation, form: Form, text: str, position: int, with_prompt: str
    ) -> str:
        """Why a rendered beginning does not begin the whole."""
        before = self.template.render(conversation.before(position), form=form).text
        if text.startswith(before) and with_prompt.startswith(before):
            added = with_prompt[len(before) :]
            return (
                f"{self.template.name} begins the assistant's turn with {added!r} for generation, which "
                f"message {position + 1} does not begin with, so that what is learnt cannot be told: "
                f"{MARKED_FIX}"
            )
        return (
            f"{self.template.name} renders the messages before message {position + 1} in another way when "
            "others follow (some templates drop earlier reasoning), so that what is learnt cannot be told: "
            f"{TEMPLATE_FIX}"
        )


def _merged(position: int, name: str, place: str = "beginning", *, in_template: bool = False) -> str:
    """in_template: the white space that is one token with the message is the template's."""
    remedy = f"remove white space at the {place} of its content"
    if in_template:
        remedy = f"{MARKED_FIX}, or whose generation prompt does not end with white space"
    return (
        f"the {place} of message {position + 1} is one token with text of {name}, so that what is learnt "
        f"cannot be told: {remedy}"
    )


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans in order, without empty ones; spans that touch each other are one."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
