"""Tool calls of messages and definitions of tools, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flora_train.data.chat.values import as_json, shorten, without_none


def parse_tool_calls(value: Any, *, merged: bool) -> list[dict[str, Any]]:
    """The tool calls of a message: `[{"type": "function", "function": {"name", "arguments"}}]`.

    Arguments are objects, also where they are written as JSON text. merged: fields that are None belong to
    other rows. Raises ValueError with the end of a sentence about the message.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        value = as_json(value, "has tool calls in text that")
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"has tool_calls that are a {type(value).__name__}: they must be a list")
    return [_tool_call(call, merged) for call in value]


def _tool_call(call: Any, merged: bool) -> dict[str, Any]:
    if isinstance(call, str):
        call = as_json(call, "has a tool call in text that")
    if not isinstance(call, Mapping):
        raise ValueError(f"has a tool call that is a {type(call).__name__}: it must be an object")
    given = {str(key): cell for key, cell in call.items() if cell is not None}
    if given.get("type", "function") != "function":
        raise ValueError(f"has a tool call of type {shorten(given['type'])}: only functions can be called")
    function = given.get("function")
    if isinstance(function, str):
        function = {"name": function, **{key: given[key] for key in ("arguments",) if key in given}}
    if function is None:  # as Qwen and Hermes write it
        function = {key: given.pop(key) for key in ("name", "arguments", "parameters") if key in given}
    if not isinstance(function, Mapping):
        raise ValueError(
            f"has a tool call whose function is a {type(function).__name__}: an object is needed"
        )
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            'has a tool call without a name: give it "function": {"name": ..., "arguments": ...}'
        )
    arguments = function.get("arguments", function.get("parameters"))
    rest = {key: cell for key, cell in function.items() if key not in ("arguments", "parameters")}
    content = {**rest, "name": name, "arguments": _arguments(arguments, name, merged)}
    return {**given, "type": "function", "function": content}


def _arguments(value: Any, name: str, merged: bool) -> dict[str, Any]:
    if isinstance(value, str):
        value = as_json(value or "{}", f"calls {shorten(name)} with arguments in text that")
    elif merged:
        value = without_none(value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"calls {shorten(name)} with arguments that are a {type(value).__name__}, not an object"
        )
    return dict(value)


def parse_tools(value: Any, column: str, *, merged: bool) -> tuple[Mapping[str, Any], ...]:
    """The definitions of tools in a cell: a list, or JSON text of one. Raises ValueError.

    A function that is not wrapped in `{"type": "function", "function": ...}` is wrapped.
    """
    in_text = isinstance(value, str)
    if isinstance(value, str):
        if not value.strip():
            return ()
        value = as_json(value, f"{column!r} is text that")
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(
            f"{column!r} holds a {type(value).__name__}: it must be a list of tools, or JSON of one"
        )
    return tuple(_tool(tool, number, column, merged and not in_text) for number, tool in enumerate(value, 1))


def _tool(tool: Any, number: int, column: str, merged: bool) -> Mapping[str, Any]:
    where = f"tool {number} of {column!r}"
    if isinstance(tool, str):
        tool, merged = as_json(tool, f"{where} is text that"), False
    if not isinstance(tool, Mapping):
        raise ValueError(f"{where} is a {type(tool).__name__}: it must be an object with a name")
    if merged:
        tool = without_none(tool)
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f'{where} has no name: give it "function": {{"name": ..., "parameters": ...}}')
    if "function" in tool:
        return dict(tool)
    return {"type": "function", "function": {key: cell for key, cell in tool.items() if key != "type"}}
