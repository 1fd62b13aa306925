"""Writes YAML that `yaml_reader` reads back equal."""

from __future__ import annotations

import json
import re
from math import inf
from typing import Any

PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
"""Text that needs no quotes, unless it is RESERVED."""
RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


def write(value: dict[str, Any]) -> str:
    """YAML that `read` reads back equal, keys in their order. value: mappings and lists of text, numbers,
    booleans and None."""
    lines: list[str] = []
    _write_mapping(value, "", lines)
    return "\n".join(lines) + "\n" if lines else "{}\n"


def _write_mapping(mapping: dict[str, Any], indent: str, lines: list[str]) -> None:
    for key, value in mapping.items():
        begin = f"{indent}{_scalar(key)}:"
        if isinstance(value, dict) and value:
            lines.append(begin)
            _write_mapping(value, f"{indent}  ", lines)
        elif (
            isinstance(value, (list, tuple))
            and value
            and not any(isinstance(item, (dict, list, tuple)) for item in value)
        ):
            lines.append(begin)
            lines.extend(f"{indent}- {_scalar(item)}" for item in value)
        else:
            lines.append(f"{begin} {_flow(value)}")


def _flow(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_scalar(key)}: {_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_flow, value))}]"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in RESERVED else _quoted(value)
    if isinstance(value, float):
        return {inf: ".inf", -inf: "-.inf"}.get(value, ".nan" if value != value else repr(value))
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    """A text in double quotes, with escapes for characters that cannot be printed. The escapes of JSON are
    valid YAML."""
    quoted = json.dumps(text, ensure_ascii=False)
    return (
        quoted
        if quoted.isprintable()
        else "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
    )
