"""Examples from one source file, and the reasons why its other functions were dropped."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType

from .comments import useful_comment, without_legal_comments
from .overlap import Problems
from .source_function import SourceFunction, indentation

BODY_LINES = range(2, 26)
MAXIMUM_FUNCTION_CHARACTERS = 1_200
FILE_CHARACTERS = range(500, 2_601)
MAXIMUM_LINE_LENGTH = 110
MAXIMUM_DATA_SHARE = 0.4

# a line of a table: it ends in a comma and calls nothing
_DATA_LINE = re.compile(r"[^()]*,$")
_RUDE_WORD = re.compile(r"\b(?:fuck|shit|crap|damn|idiot|moron|stupid|retarded|sucks)", re.IGNORECASE)
_CLOSING_LINE = re.compile(r"\s*(?:end|\}|end\)|\};)\s*$")


@dataclass(frozen=True)
class Origin:
    """Where an example comes from; these fields are written out with it."""

    package: str
    version: str
    path: str
    license: str


@dataclass(frozen=True)
class Example:
    """One line of a corpus file."""

    kind: str
    prompt: str
    completion: str
    origin: Origin
    rank: int
    """Lower goes first: 0 commented and plain, 1 commented, 2 plain, 3 neither (files: 0 whole, 1 cut)."""

    @property
    def code(self) -> str:
        """What is compared for duplicates: the signature and all that follows."""
        return self.prompt.split("\n")[-1] + self.completion

    def record(self) -> dict[str, str]:
        """The JSON object that is written."""
        return {"kind": self.kind, "prompt": self.prompt, "completion": self.completion, **vars(self.origin)}


def normalised_source(text: str) -> str:
    """LF line ends, no white space at the end of a line."""
    return "\n".join(line.rstrip() for line in text.lstrip("\ufeff").splitlines()) + "\n"


def function_examples(
    text: str, language: ModuleType, origin: Origin, problems: Problems, dropped: Counter[str]
) -> list[Example]:
    """Examples of the functions in a file; every other function is counted in `dropped` under its reason."""
    examples = []
    for function in language.functions(text):
        comment = useful_comment(function.comment, language.COMMENT)
        function = replace(function, comment=comment)
        reason = reason_to_drop(function, language, problems)
        if reason:
            dropped[reason] += 1
            continue
        plain = not function.member and not language.RECEIVER.search(function.signature + function.body)
        rank = 2 * (not comment) + (not plain)
        examples.append(Example("function", function.prompt, function.completion, origin, rank))
    return examples


def reason_to_drop(function: SourceFunction, language: ModuleType, problems: Problems) -> str | None:
    """Why a function makes no example, or None."""
    lines = [line for line in function.body.split("\n") if line.strip()]
    whole = function.prompt + function.completion
    if len(lines) not in BODY_LINES:
        return "body length"
    if len(whole) > MAXIMUM_FUNCTION_CHARACTERS:
        return "too many characters"
    if function.name.startswith("test"):
        return "test"
    return _reason_to_drop_text(whole, lines, language, problems)


def file_example(
    text: str, language: ModuleType, origin: Origin, problems: Problems, dropped: Counter[str]
) -> Example | None:
    """A file or its first part, without documentation and licence comments; None is counted in `dropped`."""
    code = without_legal_comments(language.code_only(text), language.COMMENT)
    code = re.sub(r"\n{3,}", "\n\n", code).strip("\n") + "\n"
    head = code if len(code) < FILE_CHARACTERS.stop else cut_after_function(code, FILE_CHARACTERS.stop - 1)
    reason = None
    if len(head) not in FILE_CHARACTERS:
        reason = "file length"
    elif not language.functions(head):
        reason = "file without functions"
    else:
        reason = _reason_to_drop_text(
            head, [line for line in head.split("\n") if line.strip()], language, problems
        )
    if reason:
        dropped[reason] += 1
        return None
    return Example("file", "", head, origin, rank=int(head != code))


def cut_after_function(code: str, limit: int) -> str:
    """The longest beginning, at most `limit` characters, that ends with an outermost closing line."""
    lines = code[:limit].split("\n")[:-1]
    closing = [number for number, line in enumerate(lines) if _CLOSING_LINE.match(line)]
    if not closing:
        return ""
    outermost = min(indentation(lines[number]) for number in closing)
    last = max(number for number in closing if indentation(lines[number]) == outermost)
    return "\n".join(lines[: last + 1]) + "\n"


def _reason_to_drop_text(text: str, lines: list[str], language: ModuleType, problems: Problems) -> str | None:
    if not text.isascii():
        return "not ASCII"
    if max(map(len, text.split("\n"))) > MAXIMUM_LINE_LENGTH:
        return "long line"
    if sum(bool(_DATA_LINE.match(line)) for line in lines) > MAXIMUM_DATA_SHARE * len(lines):
        return "data table"
    if _RUDE_WORD.search(text):
        return "rude word"
    if problems.named_in(text, language.DEFINED_NAME):
        return "benchmark name"
    return "benchmark text" if problems.described_in(text) else None
