"""Rows of data sets on the Hugging Face hub."""

from __future__ import annotations

import os
from itertools import islice

from flora_train.config.errors import first_line, user_error
from flora_train.config.task_schema import SourceConfig
from flora_train.data.file_rows import Row

GATED = ("gated", "401", "403", "restricted", "authenticated")
"""Words in the errors for a data set whose terms have to be accepted."""


def hub_rows(source: SourceConfig, key: str) -> list[Row]:
    """All rows of a hub data set, or its first max_rows. Raises UserError if it cannot be loaded."""
    try:
        import datasets
    except ImportError:
        hint = "needs the datasets package: pip install 'flora-train[hub]'"
        raise user_error(f"{key}.hub", source.hub, hint) from None
    options = {"data_dir": source.data_dir, "split": source.split, "revision": source.revision}
    streaming = source.max_rows is not None
    try:
        # a data set in the local cache is loaded offline as well
        rows = datasets.load_dataset(source.hub, source.subset, streaming=streaming, **options)
        for name, feature in (getattr(rows, "features", None) or {}).items():
            if isinstance(feature, datasets.Audio):  # as bytes, which data/audio decodes
                rows = rows.cast_column(name, datasets.Audio(decode=False))
        return list(islice(rows, source.max_rows))
    except (
        Exception
    ) as error:  # the library raises many types, all of which mean that the source cannot be used
        raise user_error(f"{key}.hub", source.hub, _reason(source, error)) from error


def _reason(source: SourceConfig, error: Exception) -> str:
    """Why a data set cannot be loaded, and what can be used instead."""
    instead = f"Instead, use {source.fallback_hint or 'files or a folder'}"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return f"is not in the local cache, and HF_HUB_OFFLINE forbids access to the hub: unset it. {instead}"
    message = f"{type(error).__name__}: {error}".lower()
    if any(word in message for word in GATED):
        page = f"https://huggingface.co/datasets/{source.hub}"
        return f"is gated: accept its terms on {page}, then run `hf auth login`. {instead}"
    return f"cannot be loaded ({type(error).__name__}: {first_line(error)}). {instead}"
