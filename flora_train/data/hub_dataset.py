"""Rows of a hub data set, read from its files in their order, of which no more are downloaded than needed.

The `datasets` library decides which files belong to a configuration and a split, and reads them. It sees a
folder with the names of all files and the contents of those that were downloaded, so that it makes the same
decisions without a network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flora_train.config.errors import choices, first_line
from flora_train.data.file_rows import Row
from flora_train.data.hub_description import Description
from flora_train.runtime.hub_client import with_retries
from flora_train.runtime.hub_snapshot import HubError, HubFile, HubSnapshot, is_offline

README = "README.md"
DESCRIPTIONS = (README, ".huggingface.yaml")
"""Files that describe configurations, splits and columns; the later ones are stronger."""
INFORMATION = "dataset_infos.json"
"""The description of older data sets, which is short."""
LARGEST_DOWNLOAD = 4 << 30
"""Bytes of a file up to which it is downloaded although only its first rows are read."""
READ_TOGETHER = ("folder", "webdataset")
"""Parts of the names of builders whose files do not stand alone: clips and their table."""

READER = logging.getLogger("datasets")
logger = logging.getLogger(__name__)


class HubDataset:
    """A data set at one commit. Use it as a context: its folder of names is temporary.

    data_dir: the folder of the data set that is read; None: all of it.
    """

    def __init__(self, snapshot: HubSnapshot, data_dir: str | None = None) -> None:
        self.snapshot, self.data_dir = snapshot, data_dir
        self._temporary = TemporaryDirectory(prefix="flora_train_hub_")

    def __enter__(self) -> HubDataset:
        self._level = READER.level
        READER.setLevel(logging.CRITICAL)  # its exceptions say the same
        return self

    def __exit__(self, *error: object) -> None:
        READER.setLevel(self._level)
        self._temporary.cleanup()

    def configurations(self) -> list[str]:
        """Names of its configurations."""
        import datasets

        listed = self._description.configurations
        return listed or list(datasets.get_dataset_config_names(str(self._outline)))

    def rows(self, subset: str | None, split: str, limit: int | None = None) -> Iterator[dict[str, object]]:
        """The rows of a split. limit: how many of them are used. Raises HubError, and what the reader raises
        for a damaged file."""
        import datasets

        configuration = self._description.choose(subset, self.data_dir)
        builder = self._builder(configuration)
        files = builder.config.data_files
        if split not in files:
            if "[" in split or "+" in split or split == "all":
                yield from self._rows_of_expression(builder, configuration, split)
                return
            raise HubError(f"has no split {split!r}: its splits are {choices(map(str, files))}")
        parts: list[list[str]] = [[path] for path in files[split]]
        module = type(builder).__module__
        are_archives = any(path.endswith(".zip") for path in files[split])
        if are_archives or any(name in module for name in READ_TOGETHER):
            parts = [list(files[split])]
        for part in parts:
            sources = [self._source(path, limit) for path in part]
            data_files = {datasets.NamedSplit(split): _as_data_files(sources)}
            builder.config.data_files = datasets.data_files.DataFilesDict(data_files)
            is_remote = any("://" in source for source in sources)
            try:
                yield from _stream(builder, split, name=self.snapshot.name, is_remote=is_remote)
            except Exception as error:  # the library and the readers below it have many types
                if is_remote:
                    raise
                files = choices(path.removeprefix(f"{self._outline.resolve()}/") for path in part[:3])
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise HubError(f"its file {files} cannot be read ({reason})") from error

    def _builder(self, configuration: str | None) -> Any:
        import datasets

        readme = self._outline / README
        readme.unlink(missing_ok=True)
        readme.write_text(self._description.readme(configuration), encoding="utf-8")
        return datasets.load_dataset_builder(str(self._outline), configuration, **self._options())

    def _options(self) -> dict[str, Any]:
        return {"data_dir": self.data_dir, "cache_dir": str(Path(self._temporary.name) / "cache")}

    @cached_property
    def _files(self) -> dict[str, HubFile]:
        return {file.path: file for file in self.snapshot.files(self.data_dir)}

    @cached_property
    def _description(self) -> Description:
        present = [self._files[name] for name in DESCRIPTIONS if name in self._files]
        return Description([self.snapshot.download(file) for file in present])

    @cached_property
    def _outline(self) -> Path:
        """A folder with an empty file for each file of the data set, and what describes them."""
        folder = Path(self._temporary.name) / self.snapshot.name.rpartition("/")[2]
        folder.mkdir()
        for path, file in self._files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path == INFORMATION:
                target.symlink_to(self.snapshot.download(file).resolve())
            elif path not in DESCRIPTIONS:
                target.touch()
        return folder

    def _file(self, path: str) -> HubFile | None:
        """The file of an empty file; None for a path elsewhere, which a description may name."""
        outline = str(self._outline.resolve())
        if not path.startswith(f"{outline}/"):
            return None
        return self._files[path.removeprefix(f"{outline}/")]

    def _source(self, path: str, limit: int | None) -> str:
        """What is read in place of an empty file: a downloaded file, or the address of a very large one."""
        file = self._file(path)
        if file is None:
            return path
        if limit is not None and file.size > LARGEST_DOWNLOAD and not is_offline():
            note = (
                f"{file.path} of {self.snapshot.name} has {file.size / 2**30:.1f} GB: only its first rows are"
            )
            logger.warning(f"{note} requested, and they are not kept for offline use")
            return f"hf://datasets/{self.snapshot.name}@{self.snapshot.commit}/{file.path}"
        return str(self.snapshot.download(file))

    def _rows_of_expression(self, builder: Any, configuration: str | None, split: str) -> Iterator[Row]:
        """The rows of `train[:10%]` or `train+validation`, for which all files are read."""
        import datasets

        for paths in builder.config.data_files.values():
            for path in paths:
                if self._file(path) is not None:
                    target = Path(path)
                    target.unlink()
                    target.symlink_to(Path(self._source(path, None)).resolve())
        rows = datasets.load_dataset(str(self._outline), configuration, split=split, **self._options())
        yield from undecoded(rows)


def undecoded(rows: Any) -> Any:
    """A data set whose clips stay bytes, which data/audio decodes."""
    import datasets

    for name, feature in (getattr(rows, "features", None) or {}).items():
        if isinstance(feature, datasets.Audio):
            rows = rows.cast_column(name, datasets.Audio(decode=False))
    return rows


def _as_data_files(paths: Sequence[str]) -> Any:
    from datasets.data_files import DataFilesList

    return DataFilesList(list(paths), [(path,) for path in paths])


def _stream(builder: Any, split: str, *, name: str, is_remote: bool) -> Iterator[Row]:
    """The rows of the builder's files. A remote file is opened again where the connection broke."""
    done = 0
    if not is_remote:
        yield from undecoded(builder.as_streaming_dataset(split=split))
        return
    iterator: Iterator[Mapping[str, Any]] | None = None

    def next_row() -> Mapping[str, Any] | None:
        nonlocal iterator
        try:
            if iterator is None:
                iterator = iter(undecoded(builder.as_streaming_dataset(split=split)).skip(done))
            return next(iterator, None)
        except Exception:
            iterator = None
            raise

    while (row := with_retries(next_row, name)) is not None:
        done += 1
        yield dict(row)
