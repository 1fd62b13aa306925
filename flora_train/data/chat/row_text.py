"""Special tokens that rows write, found in the text that a template makes of the rows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from flora_train.data.chat.messages import Conversation
from flora_train.data.chat.template import ChatTemplate, Form, TemplateError

Span = tuple[int, int]


class RowTokens:
    """Finds the special tokens that are written in messages and tools of a row.

    A conversation is rendered again with a mark inside each special token that its row writes. Where the
    marks come out, the text is the row's.

    special: id -> text of the special tokens of a tokenizer.
    """

    def __init__(self, special: Mapping[int, str]) -> None:
        texts = sorted({text.strip() for text in special.values()} - {""}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)", re.IGNORECASE)

    def written(self, conversation: Conversation) -> bool:
        """Whether a row writes special tokens."""
        texts = _texts([*conversation.messages, *conversation.tools])
        return any(self._pattern.search(text) for text in texts)

    def spans(
        self, conversation: Conversation, text: str, template: ChatTemplate, *, prompt: bool, form: Form
    ) -> list[Span]:
        """The parts of a rendered text, in characters, that are special tokens of the row.

        A token that the template itself reads in a message (`</think>`, to find the reasoning) is the
        template's. Raises TemplateError where the template changes with another token of the row.
        """
        mark = _unused_character(conversation, text)

        def rendered(chosen: Callable[[int, str], bool]) -> str | None:
            """The text with marks in chosen tokens of messages (-1: tools); None if it is another text."""
            marked = self._marked(conversation, mark, chosen)
            try:
                result = template.render(marked, prompt=prompt, form=form).text
            except TemplateError:
                return None
            result = result.replace(json.dumps(mark)[1:-1], mark)
            return result if result.replace(mark, "") == text else None

        result = rendered(lambda position, token: True)
        if result is None:
            result = self._most_marked(conversation, template, rendered)
        return list(self._marked_spans(result, text, mark))

    def _most_marked(
        self,
        conversation: Conversation,
        template: ChatTemplate,
        rendered: Callable[[Callable[[int, str], bool]], str | None],
    ) -> str:
        """The text with marks in all tokens but those that the template reads."""
        ours: set[tuple[int, str]] = set()
        parts = [(-1, list(conversation.tools)), *enumerate([one] for one in conversation.messages)]
        for position, values in parts:
            for token in self._tokens_in(values):
                more = {*ours, (position, token)}
                if rendered(partial(_is_in, more)) is not None:
                    ours = more
                elif token not in template.source_for(conversation):
                    raise TemplateError(_CHANGES.format(template.name, token))
                else:  # with <think>, a template reads </think>, too
                    ours = {one for one in ours if one[0] != position or _bare(one[1]) != _bare(token)}
        result = rendered(partial(_is_in, ours))
        if result is None:
            raise TemplateError(_CHANGES.format(template.name, "in this row"))
        return result

    def _tokens_in(self, values: Any) -> list[str]:
        """The special tokens in values of a row."""
        tokens: set[str] = set()
        for text in _texts(values):
            tokens.update(match[0] for match in self._pattern.finditer(text))
        return sorted(tokens)

    def _marked(
        self, conversation: Conversation, mark: str, chosen: Callable[[int, str], bool]
    ) -> Conversation:
        def in_message(position: int) -> Callable[[str], str]:
            def marked(match: re.Match[str]) -> str:
                token = match[0]
                return f"{token[0]}{mark}{token[1:]}" if chosen(position, token) else token

            return lambda text: self._pattern.sub(marked, text)

        messages = tuple(
            _keeping_role(_mapped(message, in_message(i)), message)
            for i, message in enumerate(conversation.messages)
        )
        tools = tuple(_mapped(tool, in_message(-1)) for tool in conversation.tools)
        return Conversation(messages, tools, conversation.selected)

    def _marked_spans(self, marked: str, text: str, mark: str) -> Iterator[Span]:
        end = 0
        for number, match in enumerate(re.finditer(re.escape(mark), marked)):
            begin = max(match.start() - number - 1, 0)
            token = self._pattern.match(text, begin)
            if begin >= end:
                end = max(token.end() if token else 0, begin + 1)
                yield begin, end


def _is_in(chosen: set[tuple[int, str]], position: int, token: str) -> bool:
    return (position, token) in chosen


def _bare(token: str) -> str:
    return token.replace("/", "")


_CHANGES = (
    "{} renders the row in another way because of the special token {}: remove it there, or set "
    "special_tokens: true"
)


def _unused_character(conversation: Conversation, text: str) -> str:
    """A character of a private area that neither the row nor the text has."""
    used = set(text).union(*_texts([*conversation.messages, *conversation.tools]))
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, with the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, cell in value.items():
            yield from _texts(key)
            yield from _texts(cell)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(cell, change) for key, cell in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change) for one in value]
    return value


def _keeping_role(changed: dict[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """The role is no text of the row: it is one of five words."""
    return {**changed, "role": message["role"]}
