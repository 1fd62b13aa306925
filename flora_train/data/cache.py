"""Keeps tokenized splits between runs, in files that are named by the hash of their content."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from flora_train.config.errors import UserError
from flora_train.data.token_split import TokenSplit

Split = TypeVar("Split", bound=TokenSplit)

logger = logging.getLogger(__name__)


def load_cached(path: Path, split_type: type[Split]) -> Split | None:
    """The split in `path`; None if there is none. A damaged file is deleted, so that it is made again."""
    try:
        return split_type.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return None


def cached(path: Path, split_type: type[Split], make: Callable[[], Split]) -> Split:
    """The split in `path`, or the result of `make`, which is then saved there."""
    split = load_cached(path, split_type)
    if split is not None:
        return split
    split = make()
    try:
        split.save(path)
    except (OSError, UserError) as error:  # a cache that cannot be written costs time, not the run
        logger.warning(f"tokens are not cached: {error}")
    return split
