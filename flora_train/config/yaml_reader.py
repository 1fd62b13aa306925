"""Reads YAML of any length in linear time: plain values only, without Python tags, alias bombs and duplicate
keys.

Numbers are those of YAML 1.2 where YAML 1.1 surprises: `1e-3` is a number, a date is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from yaml.resolver import Resolver

PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DEEPEST = 64
"""Nesting depth of mappings and lists, aliases included."""
MOST_BY_ALIAS = 1_000_000
"""Total number of values that aliases and references may stand for."""
MOST_FAULTS = 20
"""Faults that are listed for one text."""

UNREADABLE = "is not readable YAML"

TAG = "tag:yaml.org,2002:"
FLOAT = re.compile(
    r"""^(?:
     [-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


@dataclass(frozen=True)
class Fault:
    """One error in a text. line: from 1, None where it is not known; given: the text at that place."""

    line: int | None
    given: str | None
    hint: str


class YamlFaults(Exception):
    """A text that cannot be read, with all its faults."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("; ".join(fault.hint for fault in faults))


class _Scalars(SafeConstructor, Resolver):
    """Types and values of scalars without quotes."""

    def __init__(self) -> None:
        SafeConstructor.__init__(self)
        Resolver.__init__(self)


_Scalars.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+0123456789."))
_Scalars.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{TAG}timestamp", f"{TAG}value")]
    for first, resolvers in _Scalars.yaml_implicit_resolvers.items()
}
SCALARS = {f"{TAG}{kind}" for kind in ("str", "int", "float", "bool", "null")}


def read(text: str) -> Any:
    """The value of one YAML document, None if it is empty. Equal aliases are one object: do not change what
    is returned.

    Raises YamlFaults.
    """
    if fault := unwritable(text):
        raise YamlFaults(Fault(None, None, fault))
    return _Reader().read(text.removeprefix("\ufeff"))


def unwritable(text: str) -> str | None:
    """Why a text cannot be part of the name or content of a file, or None."""
    if "\0" in text:
        return "contains a null character, which no text or file name may have"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "is not valid UTF-8 text"
    return None


@dataclass
class _Open:
    """A mapping or list whose end is not read yet."""

    value: dict[str, Any] | list[Any]
    anchor: str | None
    size: int = 1
    """Number of values in it so far, aliases included."""
    depth: int = 1
    """Nesting depth so far, aliases included."""
    key: str | None = None
    """None: the key `<<`."""
    has_key: bool = False
    lines: dict[str, int] = field(default_factory=dict)
    merged: list[dict[str, Any]] = field(default_factory=list)


class _Reader:
    """Builds values from the parser's events, without recursion."""

    def __init__(self) -> None:
        self.scalars = _Scalars()
        self.known: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self.anchors: dict[str, tuple[Any, int, int]] = {}
        self.stack: list[_Open] = []
        self.by_alias = 0
        self.root: Any = None

    def read(self, text: str) -> Any:
        documents = 0
        for event in self._events(text):
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise YamlFaults(
                        Fault(_line(event), None, f"{UNREADABLE}: a second document begins here")
                    )
            elif isinstance(event, NodeEvent):
                self._node(event)
            elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
                self._close(event)
            if len(self.faults) >= MOST_FAULTS:
                break
        if self.faults:
            raise YamlFaults(*self.faults)
        return self.root

    def _events(self, text: str) -> Iterator[Event]:
        try:
            yield from yaml.parse(text, PARSER)
        except (yaml.YAMLError, RecursionError) as error:
            mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            line = None if mark is None else mark.line + 1
            if not reason:
                reason = next(iter(str(error).strip().splitlines()), "it is nested too deeply")
            raise YamlFaults(*self.faults, Fault(line, None, f"{UNREADABLE}: {reason}")) from None

    def _node(self, event: NodeEvent) -> None:
        if isinstance(event, AliasEvent):
            self._alias(event)
        elif isinstance(event, ScalarEvent):
            self._scalar(event)
        else:
            assert isinstance(event, (MappingStartEvent, SequenceStartEvent))
            kind = "map" if isinstance(event, MappingStartEvent) else "seq"
            if event.tag not in (None, "!", f"{TAG}{kind}"):
                self._foreign_tag(event)
            if len(self.stack) >= DEEPEST:
                raise YamlFaults(Fault(_line(event), None, f"is nested more than {DEEPEST} levels deep"))
            if self.stack and isinstance(self.stack[-1].value, dict) and not self.stack[-1].has_key:
                self._no_text_key(event, None, kind)
            self.stack.append(_Open({} if kind == "map" else [], event.anchor))

    def _scalar(self, event: ScalarEvent) -> None:
        value = self._value_of(event)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, 1, 0
        top = self.stack[-1] if self.stack else None
        if top is None or isinstance(top.value, list) or top.has_key:
            self._put(value, 1, 0, event)
        elif event.value == "<<" and event.implicit[0]:
            top.has_key, top.key = True, None
        elif isinstance(value, str):
            self._begin_key(top, value, event)
        else:
            self._no_text_key(event, event.value, {type(None): "null"}.get(type(value), type(value).__name__))
            self._begin_key(top, event.value, event)

    def _begin_key(self, top: _Open, key: str, event: Event) -> None:
        if (first := top.lines.setdefault(key, _line(event))) != _line(event) or key in top.value:
            self.faults.append(
                Fault(_line(event), key, f"this key is given twice (first on line {first}): rename one")
            )
        top.key, top.has_key = key, True

    def _alias(self, event: AliasEvent) -> None:
        if any(opened.anchor == event.anchor for opened in self.stack):
            raise YamlFaults(Fault(_line(event), f"*{event.anchor}", "refers to itself"))
        if event.anchor not in self.anchors:
            raise YamlFaults(
                Fault(
                    _line(event),
                    f"*{event.anchor}",
                    "is an alias without an anchor: no &name of that name precedes it",
                )
            )
        value, size, depth = self.anchors[event.anchor]
        self.by_alias += size
        if self.by_alias > MOST_BY_ALIAS:
            hint = f"aliases stand for more than {MOST_BY_ALIAS:,} values together: use fewer aliases"
            raise YamlFaults(Fault(_line(event), f"*{event.anchor}", hint))
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.value, dict) and not top.has_key:
            if isinstance(value, str):
                self._begin_key(top, value, event)
                return
            self._no_text_key(event, f"*{event.anchor}", "an alias")
            return
        self._put(value, size, depth, event)

    def _put(self, value: Any, size: int, depth: int, event: Event) -> None:
        """Put a finished value into the innermost open mapping or list."""
        if not self.stack:
            self.root = value
            return
        top = self.stack[-1]
        top.size += size
        top.depth = max(top.depth, depth + 1)
        if len(self.stack) + depth > DEEPEST:
            raise YamlFaults(Fault(_line(event), None, f"is nested more than {DEEPEST} levels deep"))
        if isinstance(top.value, list):
            top.value.append(value)
            return
        key, top.key, top.has_key = top.key, None, False
        if key is None:
            self._merge(top, value, event)
        else:
            top.value[key] = value

    def _merge(self, top: _Open, value: Any, event: Event) -> None:
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, dict) for part in parts):
            self.faults.append(
                Fault(_line(event), "<<", "merges keys: give it a mapping, or a list of mappings")
            )
            return
        top.merged += parts

    def _close(self, event: Event) -> None:
        closed = self.stack.pop()
        if closed.merged:
            assert isinstance(closed.value, dict)
            below: dict[str, Any] = {}
            for part in reversed(closed.merged):
                below |= part
            closed.value = below | closed.value
        if closed.anchor is not None:
            self.anchors[closed.anchor] = closed.value, closed.size, closed.depth
        self._put(closed.value, closed.size, closed.depth, event)

    def _value_of(self, event: ScalarEvent) -> Any:
        plain, quoted = event.implicit
        if (event.tag is None and not plain and quoted) or event.tag == "!":
            return self._text(event)
        if event.tag is None and event.value in self.known:
            return self.known[event.value]
        tag = event.tag or self.scalars.resolve(yaml.ScalarNode, event.value, (True, False))
        if tag == f"{TAG}str":
            return self._text(event)
        if tag == f"{TAG}merge":
            return event.value
        if tag not in SCALARS:
            self._foreign_tag(event)
            return None
        try:
            value = self.scalars.construct_object(yaml.ScalarNode(tag, event.value))
        except (ValueError, KeyError, OverflowError, yaml.YAMLError):
            self.faults.append(Fault(_line(event), event.value, f"is not a valid {tag.removeprefix(TAG)}"))
            return None
        if event.tag is None:
            self.known[event.value] = value
        return value

    def _text(self, event: ScalarEvent) -> str:
        if fault := unwritable(event.value):
            self.faults.append(Fault(_line(event), None, fault))
        return str(event.value)

    def _foreign_tag(self, event: Any) -> None:
        self.faults.append(
            Fault(
                _line(event),
                str(event.tag).replace(TAG, "!!"),
                f"{UNREADABLE}: only plain values are read, not the tag",
            )
        )

    def _no_text_key(self, event: Event, given: str | None, kind: str) -> None:
        self.faults.append(
            Fault(_line(event), given, f"YAML reads this key as {kind}, not as text: put it in quotes")
        )
        if given is None or kind == "an alias":  # the rest cannot be interpreted
            raise YamlFaults(*self.faults)


def _line(event: Event) -> int:
    return int(event.start_mark.line) + 1
