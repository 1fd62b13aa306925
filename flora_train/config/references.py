"""Resolves `${other.key}` in a configuration to the value of that key. No value comes from the environment.

${training.steps}   a key from the top; the value keeps its type if the text is nothing else
${.train}, ${..x}   a key in the same section, or one level up
\\${                 the two characters
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from flora_train.config.errors import Problem, UserError
from flora_train.config.yaml_reader import DEEPEST, MOST_BY_ALIAS

Place = tuple[str | int, ...]
"""Keys and list positions from the top to a value."""

OPENING = re.compile(r"(\\*)\$\{")
BODY = re.compile(r"(?P<dots>\.*)(?P<path>[^\s.\[\]{}:]+(?:\.[^\s.\[\]{}:]+|\[[^\s.\[\]{}:]+\])*)")
LONGEST_TEXT = 1_000_000
"""Characters of a text after references are inserted."""
MOST_PROBLEMS = 20
LITERALLY = "(a literal ${ is written \\${)"


def resolve(layers: dict[str, Any]) -> dict[str, Any]:
    """The configuration with all references resolved. Raises UserError with all references that cannot be
    resolved."""
    if not _any_reference(layers):
        return layers
    resolver = _Resolver(layers)
    found: dict[str, Any] = resolver.resolved(layers, ())
    if resolver.problems:
        raise UserError(*resolver.problems.values())
    return found


def escape(value: Any) -> Any:
    """A value whose texts `resolve` reads back literally: backslashes before `${` are doubled and one is
    added."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    return (
        OPENING.sub(lambda found: f"{found[1] * 2}\\${{", value)
        if isinstance(value, str) and "${" in value
        else value
    )


def _any_reference(value: Any) -> bool:
    """Whether a value contains `${`. Objects that occur several times are visited once."""
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
    """Resolves the references of one configuration."""

    def __init__(self, top: dict[str, Any]) -> None:
        self.top = top
        self.problems: dict[Place, Problem] = {}
        self.done: dict[Place, Any] = {}
        self.shapes: dict[int, tuple[int, int]] = {}
        self.open: set[Place] = set()
        self.referred = 0
        self.level = 0

    def resolved(self, value: Any, place: Place) -> Any:
        """The value at a path with references resolved, None if they are wrong."""
        if isinstance(value, str):
            return self._text(value, place) if "${" in value else value
        if not isinstance(value, (dict, list)):
            return value
        if place not in self.done:
            self.level += 1
            items = value.items() if isinstance(value, dict) else enumerate(value)
            found = [(key, self.resolved(item, (*place, key))) for key, item in items]
            self.level -= 1
            whole: Any = [item for _, item in found]
            if isinstance(value, dict):
                whole = dict(found)
            shapes = [self._shape(item) for _, item in found]
            self.shapes[id(whole)] = (
                1 + sum(size for size, _ in shapes),
                1 + max((depth for _, depth in shapes), default=0),
            )
            self.done[place] = whole
        return self.done[place]

    def _shape(self, value: Any) -> tuple[int, int]:
        if isinstance(value, (dict, list)):
            return self.shapes.get(id(value), (1, 0))
        return 1, 0

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
        """A text with its references replaced. A single reference keeps the type of its value."""
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
            resolver = body.partition(":")[0].strip()
            hint = f"{resolver!r} is a resolver, which is not supported: {INSTEAD} {LITERALLY}"
            return self._blame(place, text, hint)
        match = BODY.fullmatch(body.strip())
        if match is None:
            return self._blame(
                place, text, f"holds ${{{body}}}, which is not a key such as ${{training.steps}} {LITERALLY}"
            )
        try:
            target, value = _find(self.top, _target(match, place))
        except (KeyError, IndexError, ValueError):
            return self._blame(
                place, text, f"refers to {body.strip()}, which is not a key of this configuration {LITERALLY}"
            )
        if any(opened[: len(target)] == target for opened in self.open):
            return self._blame(place, text, "refers to itself")
        resolved = self.resolved(value, target)
        size, depth = self._shape(resolved)
        self.referred += size
        if self.referred > MOST_BY_ALIAS:
            return self._blame(
                place, text, f"references stand for more than {MOST_BY_ALIAS:,} values together"
            )
        if len(place) + depth > DEEPEST:
            return self._blame(place, text, f"nests more than {DEEPEST} levels deep")
        return resolved

    def _blame(self, place: Place, text: str, hint: str) -> None:
        key = ".".join(map(str, place))
        self.problems.setdefault(place, Problem(key, text, hint))
        if len(self.problems) >= MOST_PROBLEMS:
            raise UserError(*self.problems.values())


INSTEAD = (
    "write the value on the command line, and give secrets through the environment (HF_TOKEN, WANDB_API_KEY)"
)


def _pieces(text: str) -> Iterator[tuple[Any, bool]]:
    """The parts of a text: (literal, False), or (content of `${...}`, True), which is None without a closing
    brace."""
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
    if not dots:
        return words
    return (*place[: max(0, len(place) - dots)], *words)


def _find(top: Any, wanted: Place) -> tuple[Place, Any]:
    """The path of a value, with list positions as numbers, and the value. Raises KeyError, IndexError or
    ValueError."""
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
