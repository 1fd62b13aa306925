"""UserError: the error type for everything that a user can get wrong, with key or file, value and hint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from flora_train.config.terminal_text import plain

LONGEST_VALUE = 80
"""Characters of a given value that are repeated to the user."""
MOST_PROBLEMS = 50
"""Problems that one error lists; the user sees the others when these are mended."""
LONGEST_KEY = 600
MOST_CHOICES = 100
"""Words that one error lists."""


@dataclass(frozen=True)
class Problem:
    """One thing the user has to change; one line as text, in which a terminal obeys nothing.

    key:   dotted configuration key or file path, e.g. `adapters.flora.rank`
    value: what was given, as the user would recognise it (None: nothing was given)
    hint:  what is allowed instead, or the command to run
    """

    key: str
    value: object
    hint: str

    def __str__(self) -> str:
        given = "" if self.value is None else f" = {_short(_written(self.value))}"
        key = self.key if len(self.key) <= LONGEST_KEY else f"{self.key[: LONGEST_KEY - 3]}..."
        return plain(" ".join(f"{key}{given}: {self.hint}".split("\n")), keep="\t")


class UserError(Exception):
    """Everything a user can get wrong, reported at once; the CLI prints it without a traceback."""

    def __init__(self, *problems: Problem) -> None:
        self.problems: tuple[Problem, ...] = problems
        super().__init__("\n".join(str(problem) for problem in problems))


def user_error(key: str, value: object, hint: str) -> UserError:
    """A UserError with one problem: `raise user_error("tasks.lua.train", path, "no such file")`."""
    return UserError(Problem(key, value, hint))


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest allowed word, else an empty string."""
    matches: Sequence[str] = get_close_matches(str(word), list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def choices(allowed: Iterable[str]) -> str:
    """`a, b or c`; `none` where nothing is allowed; of very many the first."""
    words = sorted(allowed)
    if len(words) > MOST_CHOICES:
        return f"{', '.join(words[:MOST_CHOICES])} and {len(words) - MOST_CHOICES:,} more"
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words) or "none"


def first_line(error: BaseException) -> str:
    """What another library says, cut to one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _written(value: object) -> str:
    try:
        return repr(value[: 2 * LONGEST_VALUE] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a value that holds itself
        return f"<{type(value).__name__}>"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
