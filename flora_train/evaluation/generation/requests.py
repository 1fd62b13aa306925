"""What is generated: requests with their prompts, the samples that end, and rows while they are decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Ended = Literal["stop", "end", "length"]
Blocks = Callable[[Iterable[int]], Sequence[Collection[int]]]
"""Splits adapter ids into groups that fit in one batch, such as `bank.blocks`."""
EndsAfter = Callable[[Sequence[int]], bool]
"""Whether a text ends after all its tokens so far."""
Stream = Callable[[int, int, Sequence[int]], None]
"""Receives the number of a request, the number of its sample, and all its tokens so far, after each token.
What it raises ends the generation."""


@dataclass(frozen=True)
class Request:
    """A prompt for one adapter."""

    adapter: int
    """The adapter's id; -1 is the base model."""
    prompt: str | tuple[int, ...]
    """A text, or token ids that are read as they are."""
    keys: tuple[str, ...]
    """A name for every sample to be generated; its random draws depend on it."""
    stops: tuple[str, ...] = ()
    """A text ends before the first of these strings."""
    special_tokens: bool = False
    """Whether special tokens written in a text are tokens (a recipe's prompt) or text."""
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end the text, beside the model's own end tokens."""
    ends_after: EndsAfter | None = None
    """Whether these tokens end the text, beside stop strings and end tokens."""


@dataclass(frozen=True)
class Generated:
    """One sample."""

    request: int
    sample: int
    text: str
    tokens: int
    """Number of tokens generated, including those after a stop string."""
    ended: Ended
    """At a stop string, at the model's end token, or at max_new_tokens."""


@dataclass
class Row:
    """One sample while it is decoded."""

    request: int
    sample: int
    adapter: int
    key: str
    stops: tuple[str, ...]
    prompt: list[int]
    end_tokens: Set[int]
    tokens: list[int] = field(default_factory=list)
    ends_after: EndsAfter | None = None


Adjust = Callable[[Tensor, Sequence[Row]], Tensor]
"""The logits [B, V] that the next tokens of these rows are drawn from, instead of those of the model."""


def without_end(tokens: Sequence[int], end_tokens: Collection[int]) -> Sequence[int]:
    """The tokens without an end token, which need not be one that decoding skips."""
    if tokens and tokens[-1] in end_tokens:
        return tokens[:-1]
    return tokens
