"""UserError: the error type for everything that a user can get wrong, with key or file, value and hint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from flora_train.config.terminal_text import plain

LONGEST_VALUE = 80
"""Characters of a given value that an error repeats."""
MOST_PROBLEMS = 50
"""Largest number of problems that one error lists."""
LONGEST_KEY = 600
"""Characters of a key that an error repeats."""
MOST_CHOICES = 100
"""Largest number of choices that one error lists."""


@dataclass(frozen=True)
class Problem:
    """One thing that the user has to change. As text it is one line without terminal escapes."""

    key: str
    """Dotted configuration key or file path, such as `adapters.flora.rank`."""
    value: object
    """The given value as the user wrote it, None if there is none."""
    hint: str
    """What is allowed instead, or the command to run."""

    def __str__(self) -> str:
        given = ""
        if self.value is not None:
            given = f" = {_shorten(_written(self.value), LONGEST_VALUE)}"
        key = _shorten(self.key, LONGEST_KEY)
        return plain(" ".join(f"{key}{given}: {self.hint}".split("\n")), keep="\t")


class UserError(Exception):
    """All problems of an input at once. The command line prints them without a traceback.

    advice: one line that follows the problems, such as what can be run instead.
    """

    def __init__(self, *problems: Problem, advice: str | None = None) -> None:
        self.problems: tuple[Problem, ...] = problems
        self.advice = advice
        lines = [str(problem) for problem in problems]
        if advice is not None:
            lines.append(advice)
        super().__init__("\n".join(lines))


def user_error(key: str, value: object, hint: str) -> UserError:
    """A UserError with one problem: `raise user_error("tasks.lua.train", path, "no such file")`."""
    return UserError(Problem(key, value, hint))


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest allowed word, else an empty string."""
    matches: Sequence[str] = get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def choices(allowed: Iterable[str]) -> str:
    """`a, b or c`, shortened if there are very many; `none` if there are none."""
    names = sorted(allowed)
    if len(names) > MOST_CHOICES:
        return f"{', '.join(names[:MOST_CHOICES])} and {len(names) - MOST_CHOICES:,} more"
    if len(names) > 1:
        return f"{', '.join(names[:-1])} or {names[-1]}"
    return "".join(names) or "none"


def first_line(error: BaseException) -> str:
    """The first line of the message of another library."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _written(value: object) -> str:
    try:
        return repr(value[: 2 * LONGEST_VALUE] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or a value that contains itself
        return f"<{type(value).__name__}>"


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit - 3]}..."
