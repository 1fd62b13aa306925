"""How is a tokenised split kept between runs? As one file named by what it was made of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile

from flora_train.data.tokenization import TokenSplit

logger = logging.getLogger(__name__)

Split = TypeVar("Split", bound=TokenSplit)


def cached(path: Path, kind: type[Split], make: Callable[[], Split]) -> Split:
    """What `path` holds, or what `make` makes, which is then kept there."""
    try:
        return kind.load(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        with suppress(OSError):
            path.unlink(missing_ok=True)  # a damaged cache file is made again
    split = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        split.save(path)
    except OSError as error:  # a cache that cannot be written costs time, not the run
        logger.warning(f"tokens are not cached: {error}")
    return split
