"""Finds functions in languages with braces; a `Grammar` describes each language."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .opaque import Opaque, mask
from .source_function import BlockCommented, SourceFunction, dedent

# a longer one holds the functions worth having, as in a file that is one big closure
LONGEST_FUNCTION_LINES = 60

_LEGAL_BLOCK = re.compile(
    r"[ \t]*/[*+](?:(?!\*/|\+/).)*?(?:copyright|licen[sc]e|\(c\) *\d{4}).*?(?:\*/|\+/)[ \t]*\n?", re.I | re.S
)
_BLOCK_COMMENT_MARGIN = re.compile(r"^[ \t]*(?:\*(?!/)|\+(?!/))? ?")
_MARKUP = re.compile(
    r"</?(?:p|code|tt|em|b|i|pre|br|strong)\s*/?>|^```\w*$|\{@(?:link|see|code)\s+([^}]*)\}|\$\([A-Z_0-9]+\s+([^()]*)\)"
)


@dataclass(frozen=True)
class Grammar:
    """How one brace language writes functions and comments."""

    opaque: Opaque

    signature: re.Pattern[str]
    """Multi-line pattern on masked source, from the margin to `{`; group `margin`, and the last group is the
    name."""

    comment: str
    """The marker that every line of an extracted comment gets."""

    end_of_description: re.Pattern[str]
    """A comment line from which on parameters are listed or examples given."""

    not_names: frozenset[str] = frozenset()
    """Words that look like the name of a function but are not."""

    not_signature: re.Pattern[str] | None = None
    """What a signature must not contain."""

    attribute: re.Pattern[str] | None = None
    """A line that may stand between a comment and its function and is left out."""

    test: re.Pattern[str] | None = None
    """What the attribute above a test says."""

    dropped_words: re.Pattern[str] | None = None
    """Words in front of a signature that mean nothing to a function that stands alone."""

    bare_members: bool = False
    """Whether a method names the members of its object without a receiver."""

    brace_below: bool = False
    """Whether `{` opens a line of its own, with the signature joined to one line and a `/** */` comment
    above."""


def functions(source: str, grammar: Grammar) -> list[SourceFunction]:
    """Functions, not inside another extracted one, whose `{` ends a line and whose `}` stands alone on a
    line."""
    masked, lines, found = mask(source, grammar.opaque), source.split("\n"), []
    position = 0
    while match := grammar.signature.search(masked, position):
        position = match.end()
        end = _end_of_block(masked, match.end())
        first, last = source.count("\n", 0, match.start()), source.count("\n", 0, end or 0)
        if end is None or not _is_function(match, grammar) or last - first > LONGEST_FUNCTION_LINES:
            continue
        position = end
        brace_line = source.count("\n", 0, match.end() - 1)
        block = dedent(lines[first : last + 1], match["margin"])
        if block is None or block[-1] not in ("}", "};") or _is_test(lines, first, grammar):
            continue
        if function := _function(
            source, match, block[brace_line - first + 1 :], _comment_above(lines, first, grammar), grammar
        ):
            found.append(function)
    return found


def without_legal_blocks(source: str) -> str:
    """`source` without block comments about copyright or licences."""
    return _LEGAL_BLOCK.sub("", source)


def _function(
    source: str, match: re.Match[str], rest: list[str], comment: str, grammar: Grammar
) -> SourceFunction | None:
    """The function whose lines after the brace are `rest`, or None when its signature takes several lines."""
    # up to the brace, without a remark on the signature's own line
    signature_end = match.start() + len(match[0].rstrip()[:-1].rstrip())
    member = grammar.bare_members and bool(match["margin"])
    signature = source[match.end("margin") : signature_end]
    body = "\n".join(rest[:-1])
    if grammar.brace_below:
        signature = re.sub(r"([(\[]) | (?=[)\]])", r"\1", " ".join(signature.split()))
        return BlockCommented(_name(match), comment, signature, "{\n" + body, rest[-1], member)
    if "\n" in signature:
        return None
    if grammar.dropped_words:
        signature = grammar.dropped_words.sub("", signature)
    return SourceFunction(_name(match), comment, signature + " {", body, rest[-1], member)


def _is_function(match: re.Match[str], grammar: Grammar) -> bool:
    if _name(match) in grammar.not_names:
        return False
    return grammar.not_signature is None or not grammar.not_signature.search(match[0])


def _is_test(lines: list[str], first: int, grammar: Grammar) -> bool:
    while first > 0 and grammar.attribute and grammar.attribute.match(lines[first - 1]):
        first -= 1
        if grammar.test and grammar.test.search(lines[first]):
            return True
    return False


def _name(match: re.Match[str]) -> str:
    return match[match.lastgroup or 0]


def _end_of_block(masked: str, start: int) -> int | None:
    """Offset after the brace that closes the one before `start`."""
    depth = 1
    for brace in re.compile(r"[{}]").finditer(masked, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end()
    return None


def _comment_above(lines: list[str], first: int, grammar: Grammar) -> str:
    """The description in the comment directly above line `first`, as lines with the language's marker."""
    while first > 0 and grammar.attribute and grammar.attribute.match(lines[first - 1]):
        first -= 1
    above = lines[first - 1].strip() if first else ""
    if above.endswith(("*/", "+/")):
        texts = _block_comment(lines, first)
    else:
        start = first
        while start > 0 and re.match(r"[ \t]*//", lines[start - 1]):
            start -= 1
        texts = [re.sub(r"^[ \t]*//[/!]? ?", "", line) for line in lines[start:first]]
    kept: list[str] = []
    for text in texts:
        if grammar.end_of_description.match(text.strip()):
            break
        kept.append(_MARKUP.sub(lambda found: found[1] or found[2] or "", text).rstrip())
    if not any(kept):
        return ""
    text = "\n".join(kept).strip("\n")
    return "\n".join(f"{grammar.comment} {line}".rstrip() for line in text.split("\n"))


def _block_comment(lines: list[str], first: int) -> list[str]:
    """The text lines of the block comment that ends on the line before `first`."""
    start = first - 1
    while start > 0 and not re.match(r"[ \t]*/[*+]", lines[start]):
        start -= 1
    inside = list(lines[start:first])
    inside[0] = re.sub(r"^[ \t]*/[*+]+!? ?", "", inside[0])
    inside[-1] = re.sub(r"[ \t]*[*+]+/[ \t]*$", "", inside[-1])
    texts = [inside[0].strip(), *(_BLOCK_COMMENT_MARGIN.sub("", line) for line in inside[1:])]
    margin = min((len(text) - len(text.lstrip()) for text in texts[1:] if text.strip()), default=0)
    return [texts[0], *(text[margin:] for text in texts[1:])]
