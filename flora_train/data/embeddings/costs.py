"""Whether the texts of a draw, which the loss of embeddings couples, fit into a micro-batch."""

from __future__ import annotations

from flora_train.config.errors import Problem
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.token_split import TokenSplit


def largest_draw(split: TokenSplit, examples_per_draw: int) -> int:
    """Padded tokens of the largest draw of one adapter; 0 for a task that learns no embeddings."""
    if not isinstance(split, EmbeddingSplit):
        return 0
    return split.spec.texts * examples_per_draw * split.longest_row


def embedding_problems(
    task: str, train: TokenSplit, validation: TokenSplit, *, examples: int, tokens_per_microbatch: int
) -> list[Problem]:
    """The problems of a task whose draws do not fit into a micro-batch, or whose held-out pairs have nothing
    to be compared with. examples: per draw.
    """
    problems = []
    largest = largest_draw(train, examples)
    if largest > tokens_per_microbatch:
        hint = (
            f"cannot hold a draw of {examples} examples of task {task!r}, whose texts the loss compares in "
            f"one micro-batch: raise it to {largest}, or lower mixture.examples_per_draw or "
            "training.max_length"
        )
        problems.append(Problem("training.tokens_per_microbatch", tokens_per_microbatch, hint))
    for key, split in (("train", train), ("validation", validation)):
        if isinstance(split, EmbeddingSplit) and len(split) < split.spec.least_examples:
            hint = "has one pair, and its negatives are the texts of other pairs: give at least 2 rows"
            problems.append(Problem(f"tasks.{task}.{key}", None, hint))
    return problems
