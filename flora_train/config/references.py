"""Resolves `${other.key}` in a configuration to that key's value. There are no resolvers: no value comes from
the environment.

${training.steps}   the value of a key, from the top; its type is kept where the text is nothing else
${.train}, ${..x}   a key beside this one, or one level up \\${                 the two characters
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from flora_train.config.errors import Problem, UserError
from flora_train.config.yaml_reader import DEEPEST, MOST_BY_ALIAS

Place = tuple[str | int, ...]
"""Keys and positions from the top to a value."""

OPENING = re.compile(r"(\\*)\$\{")
BODY = re.compile(r"(?P<dots>\.*)(?P<path>[^\s.\[\]{}:]+(?:\.[^\s.\[\]{}:]+|\[[^\s.\[\]{}:]+\])*)")
LONGEST_TEXT = 1_000_000
"""Characters of a text that references are put into."""
MOST_PROBLEMS = 20
LITERALLY = "(a literal ${ is written \\${)"


def resolve(layers: dict[str, Any]) -> dict[str, Any]:
    """The configuration without references; what has none is returned as it is. Raises UserError with every
    one that means nothing."""
    if not _any_reference(layers):
        return layers
    resolver = _Resolver(layers)
    found: dict[str, Any] = resolver.resolved(layers, ())
    if resolver.problems:
        raise UserError(*resolver.problems.values())
    return found


def escape(value: Any) -> Any:
    """A value whose texts `resolve` reads back literally: one more backslash before `${`, and those before it
    doubled."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return OPENING.sub(lambda found: f"{found[1] * 2}\\${{", value) if isinstance(value, str) and "${" in value else value


def _any_reference(value: Any) -> bool:
    """Whether `${` is anywhere in it. Objects that are there several times are looked at once."""
    seen: set[int] = set()
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            if "${" in item:
                return True
        elif isinstance(item, (dict, list)) and id(item) not in seen:
            seen.add(id(item))
            rest.extend(item.values() if isinstance(item, dict) else item)
    return False


class _Resolver:
    """problems: by place, so that a fault that others refer to is told once. shapes: object -> its values and
    levels, references followed."""

    def __init__(self, top: dict[str, Any]) -> None:
        self.top = top
        self.problems: dict[Place, Problem] = {}
        self.done: dict[Place, Any] = {}
        self.shapes: dict[int, tuple[int, int]] = {}
        self.open: set[Place] = set()
        self.referred = 0
        self.level = 0

    def resolved(self, value: Any, place: Place) -> Any:
        """The value of a place without references; None where they are wrong."""
        if isinstance(value, str):
            return self._text(value, place) if "${" in value else value
        if not isinstance(value, (dict, list)):
            return value
        if place not in self.done:
            self.level += 1
            items = value.items() if isinstance(value, dict) else enumerate(value)
            found = [(key, self.resolved(item, (*place, key))) for key, item in items]
            self.level -= 1
            whole: Any = dict(found) if isinstance(value, dict) else [item for _, item in found]
            shapes = [self._shape(item) for _, item in found]
            self.shapes[id(whole)] = (
                1 + sum(size for size, _ in shapes),
                1 + max((depth for _, depth in shapes), default=0),
            )
            self.done[place] = whole
        return self.done[place]

    def _shape(self, value: Any) -> tuple[int, int]:
        return self.shapes.get(id(value), (1, 0)) if isinstance(value, (dict, list)) else (1, 0)

    def _text(self, text: str, place: Place) -> Any:
        if place in self.done:
            return self.done[place]
        if place in self.open:
            return self._blame(place, text, "refers to itself")
        if self.level >= DEEPEST:
            return self._blame(place, text, f"is a chain of more than {DEEPEST} references")
        self.open.add(place)
        self.level += 1
        found = self._joined(text, place)
        self.open.remove(place)
        self.level -= 1
        self.done[place] = found
        return found

    def _joined(self, text: str, place: Place) -> Any:
        """Literal parts and values of references; a lone reference keeps its type."""
        parts: list[Any] = []
        for part, is_reference in _pieces(text):
            if not is_reference:
                parts.append(part)
                continue
            value = self._referred(part, text, place)
            if place in self.problems:
                return None
            if part == text[2:-1] and text.startswith("${"):
                return value
            if isinstance(value, (dict, list)):
                return self._blame(place, text, f"puts {part}, which holds keys or a list, into a text")
            parts.append(str(value))
            if sum(map(len, parts)) > LONGEST_TEXT:
                return self._blame(place, text, f"becomes a text of more than {LONGEST_TEXT:,} characters")
        return "".join(parts)

    def _referred(self, body: str | None, text: str, place: Place) -> Any:
        if body is None:
            return self._blame(place, text, f"has ${{ without a closing }} {LITERALLY}")
        if ":" in body:
            return self._blame(
                place,
                text,
                f"{body.partition(':')[0].strip()!r} is a resolver, and none is known here: {INSTEAD} {LITERALLY}",
            )
        match = BODY.fullmatch(body.strip())
        if match is None:
            return self._blame(place, text, f"holds ${{{body}}}, which is no key such as ${{training.steps}} {LITERALLY}")
        try:
            target, value = _find(self.top, _target(match, place))
        except (KeyError, IndexError, ValueError):
            return self._blame(place, text, f"refers to {body.strip()}, which is no key of this configuration {LITERALLY}")
        if any(opened[: len(target)] == target for opened in self.open):
            return self._blame(place, text, "refers to itself")
        resolved = self.resolved(value, target)
        size, depth = self._shape(resolved)
        self.referred += size
        if self.referred > MOST_BY_ALIAS:
            return self._blame(place, text, f"references stand for more than {MOST_BY_ALIAS:,} values together")
        if len(place) + depth > DEEPEST:
            return self._blame(place, text, f"nests more than {DEEPEST} levels deep")
        return resolved

    def _blame(self, place: Place, text: str, hint: str) -> None:
        key = ".".join(map(str, place))
        self.problems.setdefault(place, Problem(key, text, hint))
        if len(self.problems) >= MOST_PROBLEMS:
            raise UserError(*self.problems.values())


INSTEAD = "write the value on the command line, and give secrets through the environment (HF_TOKEN, WANDB_API_KEY)"


def _pieces(text: str) -> Iterator[tuple[Any, bool]]:
    """(literal text, False) and (what stands between `${` and `}`, True), in order; None where the closing
    brace is missing."""
    start = 0
    while (found := OPENING.search(text, start)) is not None:
        literal, slashes = text[start : found.start()], len(found[1])
        kept = found[1][: slashes // 2]
        if slashes % 2:
            yield f"{literal}{kept}${{", False
            start = found.end()
            continue
        if literal or kept:
            yield literal + kept, False
        end = text.find("}", found.end())
        if end < 0:
            yield None, True
            return
        yield text[found.end() : end], True
        start = end + 1
    yield text[start:], False


def _target(match: re.Match[str], place: Place) -> Place:
    words = tuple(word for word in re.split(r"[.\[\]]+", match["path"]) if word)
    dots = len(match["dots"])
    return words if not dots else (*place[: max(0, len(place) - dots)], *words)


def _find(top: Any, wanted: Place) -> tuple[Place, Any]:
    """The place that is meant, positions in lists as numbers, and its value. Raises KeyError, IndexError or
    ValueError if there is none."""
    value: Any = top
    place: list[str | int] = []
    for part in wanted:
        if isinstance(value, list):
            position = int(part)
            place.append(position)
            value = value[position]
        elif isinstance(value, dict):
            place.append(part)
            value = value[part]
        else:
            raise KeyError(part)
    return tuple(place), value
