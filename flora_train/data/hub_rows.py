"""Rows of data sets on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.task_schema import SourceConfig
from flora_train.data.file_rows import Row
from flora_train.data.hub_dataset import HubDataset, undecoded
from flora_train.runtime.hub_client import explain, is_outage
from flora_train.runtime.hub_snapshot import HubError, open_snapshot


def hub_rows(source: SourceConfig, key: str) -> Iterator[Row]:
    """The rows of a hub data set, or its first max_rows, file by file. Raises UserError if it cannot be
    loaded."""
    try:
        import datasets
    except ImportError:
        hint = "needs the datasets package: pip install 'flora-train[hub]'"
        raise user_error(f"{key}.hub", source.hub, hint) from None
    datasets.disable_progress_bars()
    try:
        rows = _folder_rows if Path(str(source.hub)).is_dir() else _rows
        yield from rows(source)
    except (HubError, UserError) as error:
        raise _error(source, key, first_line(error)) from error
    except (
        Exception
    ) as error:  # the library raises many types, all of which mean that the source cannot be used
        reason = f"cannot be read ({type(error).__name__}: {first_line(error)})"
        if is_outage(error):
            reason = explain(error, str(source.hub), "dataset", source.revision)
        raise _error(source, key, reason) from error


def _rows(source: SourceConfig) -> Iterator[Row]:
    snapshot = open_snapshot(str(source.hub), source.revision, "dataset")
    with HubDataset(snapshot, source.data_dir) as dataset:
        rows = dataset.rows(source.subset, source.split, source.max_rows)
        yield from islice(rows, source.max_rows)


def _folder_rows(source: SourceConfig) -> Iterator[Row]:
    """The rows of a data set in a folder of this machine."""
    import datasets

    options = {"data_dir": source.data_dir, "split": source.split}
    rows = datasets.load_dataset(source.hub, source.subset, streaming=source.max_rows is not None, **options)
    yield from islice(undecoded(rows), source.max_rows)


def _error(source: SourceConfig, key: str, reason: str) -> UserError:
    """Why a data set cannot be loaded, and what can be used instead."""
    instead = f"Instead, use {source.fallback_hint or 'files or a folder'}"
    return user_error(f"{key}.hub", source.hub, f"{reason}. {instead}")
