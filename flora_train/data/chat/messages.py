"""Conversations of rows, in the layouts of OpenAI and ShareGPT, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flora_train.config.errors import choices, did_you_mean
from flora_train.config.json_format import parse_json
from flora_train.data.chat.tool_calls import parse_tool_calls, parse_tools
from flora_train.data.chat.values import as_json, shorten, without_none

Message = dict[str, Any]
"""A message as chat templates take it: role, content, tool_calls, name and others. No key is None."""

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Names in `from` -> role."""
CALLS = ("function_call", "tool_call")
"""Names in `from` of turns whose value is the tool calls."""
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part that is text -> its key."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant's message that templates may write although it has no content."""


@dataclass(frozen=True)
class ChatColumns:
    """The columns of a conversation: `messages`, or `prompt` and `completion` as lists of messages."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    tools: str | None = None
    """None: rows have no tools."""
    system: str | None = None
    """A column of system prompts beside the messages; None: rows have none."""


@dataclass(frozen=True)
class Conversation:
    """One conversation as chat templates take it."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions of the functions that the assistant may call."""
    selected: tuple[bool, ...] = ()
    """Of each message: whether it may be learnt (`weight: 1`, `train: true`, not part of a prompt). Empty:
    all may."""

    @property
    def assistant_turns(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def may_learn(self, position: int) -> bool:
        """Whether a message may be learnt, as its row says."""
        return not self.selected or self.selected[position]

    def before(self, position: int) -> Conversation:
        """The conversation up to a message, without it."""
        return replace(self, messages=self.messages[:position], selected=self.selected[:position])


def parse_conversation(row: Mapping[str, Any], columns: ChatColumns, *, merged: bool) -> Conversation:
    """The conversation of a row.

    merged: the rows are records with the same fields (Parquet, Arrow), so that a missing field is None in
    them, also within tool calls. Raises ValueError with the reason and what to change.
    """
    messages: list[Message] = []
    selected: list[bool] = []
    if columns.messages is not None:
        sources = [(columns.messages, True)]
    else:
        sources = [(str(columns.prompt), False), (str(columns.completion), True)]
    for column, is_learnt in sources:
        for number, message in enumerate(_message_list(row.get(column), column), start=1):
            where = f"message {number} of {column!r}"
            try:
                messages.append(_message(message, merged))
                selected.append(is_learnt and _weight(message))
            except ValueError as error:
                raise ValueError(f"{where} {error}") from None
    system = None if columns.system is None else row.get(columns.system)
    if isinstance(system, str) and system.strip() and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": _clean(system)})
        selected.insert(0, columns.messages is not None)
    tools: tuple[Mapping[str, Any], ...] = ()
    if columns.tools is not None:
        tools = parse_tools(row.get(columns.tools), columns.tools, merged=merged)
    return Conversation(tuple(messages), tools, tuple(selected))


def parse_messages(value: Any, name: str = "messages", *, merged: bool = False) -> list[Message]:
    """The messages of a list, or of JSON text of one. Raises ValueError with the reason and what to change.

    name: of the list, for errors.
    """
    messages = []
    for number, message in enumerate(_message_list(value, name), start=1):
        try:
            messages.append(_message(message, merged))
        except ValueError as error:
            raise ValueError(f"message {number} of {name!r} {error}") from None
    return messages


def is_message_list(value: Any) -> bool:
    """Whether a cell is a conversation: a list of messages, or JSON text of one."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = parse_json(value)
        except ValueError:
            return False
    value = _as_rows(value)
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value)


def _as_rows(value: Any) -> Any:
    """Messages that are kept as columns, `{"role": [...], "content": [...]}`, as older data sets of the hub
    have them, as rows; any other value as it is."""
    if not isinstance(value, Mapping) or not ({"role", "from"} & value.keys()):
        return value
    columns = list(value.values())
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _message_list(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str):
        value = as_json(value, f"{name!r} is text that")
    value = _as_rows(value)
    if value is None:
        raise ValueError(f"has no {name!r}: give it messages, or remove the row")
    if not isinstance(value, list):
        raise ValueError(
            f"{name!r} holds a {type(value).__name__}: it must be a list of messages, each with role and "
            "content (or from and value)"
        )
    if not value:
        raise ValueError(f"{name!r} is an empty conversation: give it messages, or remove the row")
    return value


def _message(value: Any, merged: bool) -> Message:
    """A message of any layout. Raises ValueError with the end of a sentence."""
    if not isinstance(value, Mapping):
        raise ValueError(f"is a {type(value).__name__}: it must be an object with role and content")
    given = {str(key): cell for key, cell in value.items() if cell is not None}
    if "role" in given:
        message = _openai_message(given, merged)
    elif "from" in given:
        message = _sharegpt_message(given, merged)
    else:
        raise ValueError(f"has neither role nor from: it has the keys {choices(given)}")
    return {key: _clean(cell) for key, cell in message.items()}


def _openai_message(given: Message, merged: bool) -> Message:
    role = given["role"]
    if role == "function":  # as before tool calls
        role = "tool"
    if not isinstance(role, str) or role not in ROLES:
        other = OTHER_NAMES.get(str(role).lower())
        hint = f" Write {other!r}." if other else did_you_mean(str(role), ROLES)
        raise ValueError(f"has the unknown role {shorten(role)}: roles are {', '.join(ROLES)}.{hint}")
    calls = given.get("tool_calls")
    if calls is None and "function_call" in given:
        calls = [given["function_call"]]
    message = {key: cell for key, cell in given.items() if key not in ("weight", "train", "function_call")}
    message |= {"role": role}
    if "content" in given:
        message["content"] = _text(given["content"], "content")
    return _checked(message, calls, merged)


def _sharegpt_message(given: Message, merged: bool) -> Message:
    name = given["from"]
    role = OTHER_NAMES.get(str(name).lower())
    if role is None:
        hint = did_you_mean(str(name), OTHER_NAMES)
        raise ValueError(f"is from the unknown role {shorten(name)}: known are {choices(OTHER_NAMES)}.{hint}")
    message = {key: cell for key, cell in given.items() if key not in ("weight", "train", "from", "value")}
    message |= {"role": role}
    calls = given.get("tool_calls")
    if str(name).lower() in CALLS:
        calls = given.get("value")
    elif "value" in given:
        message["content"] = _text(given["value"], "value")
    return _checked(message, calls, merged)


def _checked(message: Message, calls: Any, merged: bool) -> Message:
    """The message with its tool calls, if it says something."""
    message.pop("tool_calls", None)
    found = parse_tool_calls(calls, merged=merged)
    if found and message["role"] != "assistant":
        raise ValueError(f"has tool calls, but the role {message['role']!r}: only the assistant calls tools")
    if merged:
        message = without_none(message)
    if found:
        message["tool_calls"] = found
    has_reasoning = message["role"] == "assistant" and any(key in message for key in REASONING)
    if "content" not in message and not found and not has_reasoning:
        raise ValueError(f"({message['role']}) has no content: give it text, or remove it")
    return message


def _text(content: Any, key: str) -> str:
    """The text of a content: text, or a list of parts of text."""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise ValueError(f"has a {key} that is a {type(content).__name__}: it must be text")
    return "".join(_text_of_part(part) for part in content)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"has a content part that is a {type(part).__name__}: it must be text")
    kind = part.get("type", "text" if "text" in part else None)
    key = TEXT_PARTS.get(str(kind))
    if key is None:
        raise ValueError(
            f"has a content part of type {shorten(kind)}: only text can be learnt; remove the part or the row"
        )
    text = part.get(key)
    if not isinstance(text, str):
        raise ValueError(f"has a content part of type {kind!r} without {key}: give it, or remove the part")
    return text


def _weight(message: Mapping[str, Any]) -> bool:
    """Whether a message may be learnt."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (not isinstance(weight, int | float) or weight not in (0, 1)):
        raise ValueError(f"has the weight {shorten(weight)}: it must be 0 (not learnt) or 1")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"has train = {shorten(train)}: it must be true or false")
    return weight != 0 and train is not False


def _clean(value: Any) -> Any:
    """A value whose texts have no halves of surrogate pairs, which JSON can hold and tokenizers reject."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_clean(key): _clean(cell) for key, cell in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(one) for one in value]
    return value
