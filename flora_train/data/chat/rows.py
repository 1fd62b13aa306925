"""Rows of conversations: which columns hold them, and the examples that they become."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.json_format import JsonObject
from flora_train.config.task_schema import TaskConfig
from flora_train.data.chat.encoder import ChatEncoder, EncodedConversation
from flora_train.data.chat.messages import (
    REASONING,
    ChatColumns,
    Conversation,
    is_message_list,
    parse_conversation,
)
from flora_train.data.chat.template import ChatTemplate, lacking_tokens
from flora_train.data.chat.turns import Learn
from flora_train.data.documents import EncodedExample, LocatedRow, RowsOutline
from flora_train.data.tokenization import cut

MESSAGE_COLUMNS = ("messages", "conversations")
"""Columns of conversations that need not be named."""
TOOL_COLUMNS = ("tools", "functions")
"""Columns of definitions of tools that need not be named."""
PROMPT, COMPLETION, SYSTEM = "prompt", "completion", "system"
JSON_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Endings of files whose records have no fields of other records."""
CHUNK_ROWS = 128
"""Conversations that are tokenized in one call."""

logger = logging.getLogger(__name__)


def chat_columns(task: TaskConfig, rows: RowsOutline) -> ChatColumns | None:
    """The columns of a task of conversations, None for a task of text.

    rows: the training rows. Without `messages`, rows are conversations where their column `messages` or
    `conversations` holds lists, or where their prompt and completion do; also where they have no other column
    that need not be named.
    """
    if task.messages is not None:
        return _with_tools(task, rows, ChatColumns(messages=task.messages))
    if task.text is not None:
        return None
    first: Mapping[str, Any] = rows.first.cells if rows.first is not None else {}
    if task.prompt is None:
        named = next((column for column in MESSAGE_COLUMNS if _is_chat_column(column, rows, first)), None)
        if named is not None:
            return _with_tools(task, rows, ChatColumns(messages=named))
    prompt, completion = task.prompt or PROMPT, task.completion or COMPLETION
    if is_message_list(first.get(prompt)) and is_message_list(first.get(completion)):
        return _with_tools(task, rows, ChatColumns(prompt=prompt, completion=completion))
    if task.prompt is None and not _has_text_columns(rows):  # the first row may be malformed
        named = next((column for column in MESSAGE_COLUMNS if column in rows.columns), None)
        if named is not None:
            return _with_tools(task, rows, ChatColumns(messages=named))
    return None


def check_chat_keys(task: TaskConfig, rows: RowsOutline, key: str) -> None:
    """Raises UserError if a task of text has keys of conversations."""
    for name in ("learn", "chat_template", "tools"):
        value = getattr(task, name)
        if value is not None:
            hint = (
                "is for conversations, and no column of the rows holds any: name it with messages, or remove "
                f"this key. Columns are {choices(rows.columns)}"
            )
            raise user_error(f"{key}.{name}", value, hint)


def merges_fields(file: str) -> bool:
    """Whether the records of a source have all fields of each other, None where they lack them (Parquet, data
    sets of the hub)."""
    return not file.lower().endswith(JSON_FILES)


def _is_chat_column(column: str, rows: RowsOutline, first: Mapping[str, Any]) -> bool:
    if column not in rows.columns:
        return False
    value = first.get(column)
    return value is None or isinstance(value, list) or is_message_list(value)


def _has_text_columns(rows: RowsOutline) -> bool:
    """Whether rows have columns of text that need not be named."""
    return "text" in rows.columns or {PROMPT, COMPLETION} <= set(rows.columns)


def _with_tools(task: TaskConfig, rows: RowsOutline, columns: ChatColumns) -> ChatColumns:
    tools = task.tools
    if tools is None:
        tools = next((name for name in TOOL_COLUMNS if name in rows.columns), None)
    system = SYSTEM if SYSTEM in rows.columns else None
    return ChatColumns(columns.messages, columns.prompt, columns.completion, tools, system)


class ChatRowEncoder:
    """Encodes rows of conversations.

    rows: the training rows. Raises UserError if a column is missing, or there is no usable template.
    """

    def __init__(
        self,
        task: TaskConfig,
        tokenizer: Any,
        *,
        columns: ChatColumns,
        rows: RowsOutline,
        max_length: int,
        key: str,
    ) -> None:
        self.task, self.columns, self.key, self.max_length = task, columns, key, max_length
        self.learn: Learn = task.learn or "assistant"
        self.check(rows, "training")
        self.template = ChatTemplate.of(tokenizer, task.chat_template, key)
        if lacking := lacking_tokens(self.template, tokenizer):
            tokens = ", ".join(lacking)
            logger.warning(f"{key}: the base has no token for {tokens} of the chat template: ordinary text")
        self.encoder = ChatEncoder(self.template, tokenizer, task.special_tokens)

    @property
    def setting(self) -> JsonObject:
        template = self.template
        return {
            "columns": asdict(self.columns),
            "template": [template.source, template.variants.get("tool_use")],
            "variables": {name: str(value) for name, value in template.variables.items()},
            "today": template.today.isoformat(),
            "learn": self.learn,
            "max_length": self.max_length,
            "truncation": self.task.truncation,
            "special_tokens": self.task.special_tokens,
        }

    def check(self, rows: RowsOutline, split: str) -> None:
        """Raises UserError if a column of the conversations is in no row of a split."""
        named = {"messages": self.columns.messages, "prompt": self.columns.prompt}
        named |= {"completion": self.columns.completion, "tools": self.task.tools}
        for name, column in named.items():
            if column is not None and column not in rows.columns:
                hint = f"{column!r} is not a column of the {split} rows; they have {choices(rows.columns)}."
                raise user_error(f"{self.key}.{name}", column, hint + did_you_mean(column, rows.columns))

    def conversation(self, row: LocatedRow) -> Conversation:
        """The conversation of a row. Raises UserError that names the row."""
        try:
            found = parse_conversation(row.cells, self.columns, merged=merges_fields(row.file))
            if self.learn != "all" and not found.assistant_turns:
                raise ValueError(
                    "the conversation has no turn of the assistant, so that nothing is learnt: add one, "
                    "remove the row, or set learn: all"
                )
        except ValueError as error:
            raise self._error(row, error) from None
        return found

    def encode(self, rows: Sequence[LocatedRow]) -> Iterator[EncodedExample]:
        limit = None if self.task.truncation == "split" and self.learn == "all" else self.max_length
        notes = self.encoder.check_complete.notes
        for begin in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[begin : begin + CHUNK_ROWS]
            conversations = [self.conversation(row) for row in chunk]
            encoded = self.encoder.encode(conversations, self.learn, limit)
            for row, conversation, one in zip(chunk, conversations, encoded, strict=True):
                if isinstance(one, ValueError):
                    raise self._error(row, one)
                yield self._example(conversation, one)
            while notes:
                logger.warning(f"{self.key}: {notes.pop()}")

    def _error(self, row: LocatedRow, error: ValueError) -> Exception:
        return user_error(self.key, None, f"{row.where}: {error}")

    def _example(self, conversation: Conversation, encoded: EncodedConversation) -> EncodedExample:
        written = encoded.encoded.written
        if not encoded.spans or not _has_text(conversation, self.learn):
            return EncodedExample((), "empty", written)
        truncation, head = self.task.truncation, list[int]()
        if truncation == "split":
            truncation = "truncate"
            if encoded.learns_all:
                truncation, head = "split", self.encoder.start_of(encoded)
        fate, parts = cut(encoded.length - len(head), self.max_length - len(head), truncation)
        documents = [encoded.document(begin + len(head), end + len(head), head) for begin, end in parts]
        learnt = [document for document in documents if any(end > 1 for _, end in document.spans)]
        if documents and not learnt:  # every turn that is learnt is cut off
            return EncodedExample((), "prompt_too_long", written)
        return EncodedExample(tuple(learnt), fate, written)


def _has_text(conversation: Conversation, learn: Learn) -> bool:
    """Whether a message that is learnt has text or calls tools."""
    positions = list(range(len(conversation.messages)))
    if learn != "all":
        positions = conversation.assistant_turns
    if learn == "last":
        positions = positions[-1:]
    learnt = [conversation.messages[i] for i in positions if conversation.may_learn(i)]
    return any(
        str(message.get("content") or "").strip()
        or any(message.get(key) for key in ("tool_calls", *REASONING))
        for message in learnt
    )
