"""Completions of a prompt as messages: in columns of their own, or as whole conversations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.json_format import JsonValue
from flora_train.config.task_schema import TaskConfig
from flora_train.data.chat.messages import ChatColumns, is_message_list, parse_conversation
from flora_train.data.chat.rows import ChatRowEncoder, merges_fields
from flora_train.data.chat.values import as_json
from flora_train.data.documents import EncodedExample, LocatedRow, RowsOutline

Messages = list[Any]
COLUMNS = ChatColumns(prompt="prompt", completion="completion", tools="tools")
TOOLS = "tools"
"""Default column of the functions that an assistant may call."""
ROWS_AT_ONCE = 256
"""Rows that are tokenized in one call."""


def holds_messages(rows: RowsOutline, prompt: str | None, completions: Sequence[str]) -> bool:
    """Whether the prompt or the completions of rows are lists of messages."""
    if rows.first is None:
        return False
    cells = rows.first.cells
    return any(is_message_list(cells.get(column)) for column in (*completions, prompt) if column)


class MessageCompletions:
    """Tokenizes completions that are messages, after a prompt of messages.

    Layouts: prompt and completions as lists of messages; completions as whole conversations, whose common
    beginning is the prompt (a single one: all but the last turn of the assistant); and text on one side,
    which is a message of the user or the assistant.
    """

    def __init__(
        self,
        task: TaskConfig,
        tokenizer: Any,
        prompt: str | None,
        completions: Sequence[str],
        *,
        max_length: int,
        key: str,
    ) -> None:
        self.prompt, self.names, self.key = prompt, tuple(completions), key
        self.tools = task.tools or TOOLS
        columns = RowsOutline(("prompt", "completion", "tools", self.tools), None)
        self.encoder = ChatRowEncoder(
            task, tokenizer, columns=COLUMNS, rows=columns, max_length=max_length, key=key
        )
        self.setting: JsonValue = [prompt, list(completions), self.tools, self.encoder.setting]

    @property
    def columns(self) -> Mapping[str, str]:
        names = ("chosen", "rejected") if len(self.names) > 1 else ("completion",)
        return {column: f"{self.key}.{name}" for column, name in zip(self.names, names, strict=True)}

    def are_same(self, row: LocatedRow) -> bool:
        lists = [self._list(row, column, "assistant") for column in self.names]
        return any(other == lists[0] for other in lists[1:])

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[list[EncodedExample]]:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            conversations = [conversation for row in chunk for conversation in self._conversations(row)]
            encoded = self.encoder.encode(conversations)
            for row in chunk:
                examples = [next(encoded) for _ in self.names]
                self._check_prompts(row, examples)
                yield examples

    def _conversations(self, row: LocatedRow) -> list[LocatedRow]:
        """The conversation of each completion, with the columns prompt and completion."""
        lists = [self._list(row, column, "assistant") for column in self.names]
        prompt = self._prompt(row, lists)
        for name, messages in zip(self.names, lists, strict=True):
            self._check_messages(row, name, messages)
        if self.prompt is not None and prompt:
            self._check_messages(row, self.prompt, prompt)
        conversations = []
        for name, messages in zip(self.names, lists, strict=True):
            completion = messages
            if messages[: len(prompt)] == prompt:
                completion = messages[len(prompt) :]
            if not completion:
                raise self._error(row, f"{name!r} holds the prompt only: give it the assistant's turn")
            if _role(completion[0]) != "assistant":
                raise self._error(
                    row,
                    f"{name!r} continues the prompt with a message of {_role(completion[0])!r}: completions "
                    "begin with a turn of the assistant, after the same prompt",
                )
            cells = {"prompt": prompt, "completion": completion, "tools": row.cells.get(self.tools)}
            conversations.append(LocatedRow(cells, row.file, row.number))
        return conversations

    def _prompt(self, row: LocatedRow, lists: Sequence[Messages]) -> Messages:
        given = None if self.prompt is None else row.cells.get(self.prompt)
        whole = all(_role(messages[0]) != "assistant" for messages in lists)
        if given is not None and not (whole and not is_message_list(given)):
            return self._list(row, str(self.prompt), "user")
        if len(lists) == 1:
            turns = [i for i, message in enumerate(lists[0]) if _role(message) == "assistant"]
            return lists[0][: turns[-1]] if turns else lists[0]
        first, second = lists
        common = 0
        while common < min(len(first), len(second)) and first[common] == second[common]:
            common += 1
        return first[:common]

    def _list(self, row: LocatedRow, column: str, role: str) -> Messages:
        """The messages in a cell; text is one message of `role`."""
        cell = row.cells.get(column)
        try:
            if isinstance(cell, str):
                if not is_message_list(cell):
                    return [{"role": role, "content": cell}]
                cell = as_json(cell, f"{column!r} is text that")
        except ValueError as error:
            raise self._error(row, str(error)) from None
        if not isinstance(cell, list) or not cell or not all(isinstance(one, Mapping) for one in cell):
            raise self._error(row, f"{column!r} must hold messages: a list with role and content of each")
        return list(cell)

    def _check_messages(self, row: LocatedRow, column: str, messages: Messages) -> None:
        """Raises UserError that names the column for a message that cannot be read."""
        try:
            parse_conversation(
                {column: messages}, ChatColumns(messages=column), merged=merges_fields(row.file)
            )
        except ValueError as error:
            raise self._error(row, str(error)) from None

    def _check_prompts(self, row: LocatedRow, examples: Sequence[EncodedExample]) -> None:
        """Raises UserError if the completions of a row do not follow the same tokens."""
        documents = [example.documents[0] for example in examples if example.documents]
        if len(documents) < 2:
            return
        begins = [document.spans[0][0] for document in documents]
        heads = [document.tokens[: begins[0]].tolist() for document in documents]
        if len(set(begins)) > 1 or heads[0] != heads[1]:
            raise self._error(
                row,
                "the chat template writes another prompt before the chosen completion than before the "
                "rejected one: remove the row, or give another chat_template",
            )

    def _error(self, row: LocatedRow, reason: str) -> Exception:
        return user_error(self.key, None, f"{row.where}: {reason}")


def _role(message: Any) -> str:
    """The role of a message in either layout."""
    role = str(message.get("role") or message.get("from") or "")
    return "assistant" if role in ("gpt", "chatgpt", "bot", "model") else role
