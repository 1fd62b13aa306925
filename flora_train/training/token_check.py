"""Checks that the model can read every token of the data and every example to its end, before the model is
loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.data.array_file import blocks
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.data.tokenization import pad_token
from flora_train.models.context_length import declared_positions, independent_up_to, max_readable_length
from flora_train.models.loading import empty_model, load_model_config
from flora_train.models.probe_inputs import count_tokens

logger = logging.getLogger(__name__)


def check_tokens(config: RunConfig, tokenizer: Any, tasks: Mapping[str, Task]) -> None:
    """Raises UserError if a token's id is beyond the model's embedding, or an example has more tokens than
    the model has positions.
    """
    rows = count_tokens(empty_model(config.model))
    problems = [*_special_tokens(config, tokenizer, rows), *_unknown_tokens(tokenizer, tasks, rows)]
    if not problems:
        problems = list(_long_examples(config, tasks))
    if problems:
        raise UserError(*problems)


def _special_tokens(config: RunConfig, tokenizer: Any, rows: int) -> Iterator[Problem]:
    for kind, number in (("padding", pad_token(tokenizer)), ("end", tokenizer.eos_token_id)):
        if number is not None and number >= rows:
            hint = (
                f"its tokenizer's {kind} token {tokenizer.convert_ids_to_tokens(number)!r} has the id "
                f"{number}, and the model has the "
                f"tokens 0 to {rows - 1}: choose one of these (tokenizer.pad_token = tokenizer.eos_token) "
                "and save the tokenizer, or "
                "enlarge the model's embedding and save both"
            )
            yield Problem("model.path", config.model.path, hint)


def _unknown_tokens(tokenizer: Any, tasks: Mapping[str, Task], rows: int) -> Iterator[Problem]:
    for key, split in _splits(tasks):
        largest = max((int(block.max()) for block in blocks(split.tokens)), default=-1)
        if largest >= rows:
            number = largest
            hint = (
                f"holds the token {tokenizer.convert_ids_to_tokens(number)!r} with the id {number}, and the "
                "model has the tokens 0 to "
                f"{rows - 1}: the tokenizer is of another model, or got tokens that the model's embedding "
                "did not"
            )
            yield Problem(key, None, hint)


def _long_examples(config: RunConfig, tasks: Mapping[str, Task]) -> Iterator[Problem]:
    lengths = {key: int(np.diff(split.offsets).max(initial=0)) for key, split in _splits(tasks)}
    key, longest = max(lengths.items(), key=lambda item: item[1], default=("", 0))
    model_config = load_model_config(config.model)
    limit = max_readable_length(config.model, model_config, longest)
    declared, independent = declared_positions(model_config), independent_up_to(model_config)
    if limit is not None:
        hint = (
            f"{key} has an example of {longest} tokens, and the model has positions for {limit}: give at "
            f"most {limit}"
        )
        yield Problem("training.max_length", config.training.max_length, hint)
    elif independent is not None and longest > independent:
        hint = (
            f"{key} has an example of {longest} tokens; beyond {independent} the model recomputes the "
            "positions of all rows "
            f"of a batch, so that rows would depend on their neighbours: give at most {independent}"
        )
        yield Problem("training.max_length", config.training.max_length, hint)
    elif declared is not None and longest > declared:
        logger.warning(
            f"{key} has an example of {longest} tokens; the model was made for {declared} "
            "(max_position_embeddings)"
        )


def _splits(tasks: Mapping[str, Task]) -> Iterator[tuple[str, TokenSplit]]:
    """(configuration key, tokens) of every split."""
    for name, task in tasks.items():
        for split in ("train", "validation", "test"):
            tokens = getattr(task, split, None)
            if tokens is not None:
                yield f"tasks.{name}.{split}", tokens
