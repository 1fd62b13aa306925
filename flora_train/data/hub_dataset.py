"""Rows of a hub data set, read from its files in their order, of which no more are downloaded than needed.

The `datasets` library decides which files belong to a configuration and a split, and reads them. It sees a
folder with the names of all files and the contents of those that were downloaded, so that it makes the same
decisions without a network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from zipfile import BadZipFile

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

NO_SCRIPTS = "scripts are no longer supported"
"""In the error of datasets for a data set that is read by a script of its own."""
CONVERTED = (
    "is read by a script, which datasets no longer runs: set revision to refs/convert/parquet, where the hub "
    "keeps a conversion of most such data sets, and data_dir to the name of the subset instead of subset"
)
QUIET_LOGGERS = ("datasets", "huggingface_hub.repocard_data", "huggingface_hub.repocard")
"""Loggers of what the errors here say in one line, and of descriptions without metadata."""

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class HubDataset:
    """A data set at one commit. Use it as a context: its folder of names is temporary.

    data_dir: the folder of the data set that is read; None: all of it.
    """

    def __init__(self, snapshot: HubSnapshot, data_dir: str | None = None) -> None:
        self.snapshot, self.data_dir = snapshot, data_dir and _normalized(data_dir)
        self._temporary = TemporaryDirectory(prefix="flora_train_hub_")
        self._levels: dict[str, int] = {}

    def __enter__(self) -> HubDataset:
        for name in QUIET_LOGGERS:
            self._levels[name] = logging.getLogger(name).level
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *error: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._temporary.cleanup()

    def configurations(self) -> list[str]:
        """Names of its configurations."""
        import datasets

        listed = self._description.configurations
        return listed or self._ask(lambda: list(datasets.get_dataset_config_names(str(self._outline))))

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
            if len(sources) == 1 and _is_empty_parquet(sources[0]):
                continue
            try:
                yield from _stream(builder, split, name=self.snapshot.name, is_remote=is_remote)
            except Exception as error:  # the library and the readers below it have many types
                if is_remote:
                    raise
                if isinstance(error.__cause__, StopIteration):  # the library's reader of a file without rows
                    continue
                files = choices(path.removeprefix(f"{self._outline.resolve()}/") for path in part[:3])
                raise HubError(f"its file {files} cannot be read ({self._reason(error)})") from error

    def _builder(self, configuration: str | None) -> Any:
        import datasets

        readme = self._outline / README
        readme.unlink(missing_ok=True)
        readme.write_text(self._description.readme(configuration), encoding="utf-8")
        options = self._options()
        builder = self._ask(
            lambda: datasets.load_dataset_builder(str(self._outline), configuration, **options)
        )
        for paths in builder.config.data_files.values():
            for path in paths:
                if self._file(path) is None:
                    name = self._without_outline(path)
                    raise HubError(f"its description names the file {name!r}, which does not belong to it")
        return builder

    def _ask(self, question: Callable[[], Result]) -> Result:
        """What the library answers about the data set. Raises HubError."""
        try:
            try:
                return question()
            except BadZipFile:  # it looks into archives for the format of their files
                self._link([path for path in self._files if path.endswith(".zip")])
                return question()
        except HubError:
            raise
        except Exception as error:  # the library has many types
            if NO_SCRIPTS in str(error):
                raise HubError(CONVERTED) from error
            raise HubError(f"cannot be read ({self._reason(error)})") from error

    def _link(self, paths: Sequence[str]) -> None:
        """Replace empty files by what they stand for."""
        for path in paths:
            target = self._outline / path
            content = self.snapshot.download(self._files[path]).resolve()
            target.unlink()
            target.symlink_to(content)

    def _reason(self, error: Exception) -> str:
        """An error of the library, without the folder of names and the list of all formats."""
        text = first_line(error).partition(" with any supported extension")[0]
        return f"{type(error).__name__}: {self._without_outline(text)}"

    def _without_outline(self, text: str) -> str:
        for folder in (self._outline, self._outline.resolve()):
            text = text.replace(f"{folder}/", "").replace(str(folder), self.snapshot.name)
        return text

    def _options(self) -> dict[str, Any]:
        return {"data_dir": self.data_dir, "cache_dir": str(Path(self._temporary.name) / "cache")}

    @cached_property
    def _files(self) -> dict[str, HubFile]:
        folder = self.data_dir
        if folder is not None and set(folder) & set("*?["):  # a pattern, which the library resolves
            folder = None
        return {file.path: file for file in self.snapshot.files(folder)}

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
        for outline in (self._outline.resolve(), self._outline):
            if path.startswith(f"{outline}/"):
                return self._files.get(path.removeprefix(f"{outline}/"))
        return None

    def _source(self, path: str, limit: int | None) -> str:
        """What is read in place of an empty file: a downloaded file, or the address of a very large one."""
        file = self._file(path)
        if file is None:
            raise HubError(f"its file {self._without_outline(path)} does not belong to it")
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
            self._link([self._without_outline(path) for path in paths])
        rows = datasets.load_dataset(str(self._outline), configuration, split=split, **self._options())
        yield from undecoded(rows)


def undecoded(rows: Any) -> Any:
    """A data set whose clips stay bytes, which data/audio decodes, as do its pictures and videos."""
    import datasets

    features = getattr(rows, "features", None) or {}
    if features and isinstance(rows, datasets.IterableDataset):
        return rows.decode(False)
    for name, feature in features.items():
        if isinstance(feature, (datasets.Audio, datasets.Image, datasets.Video)):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _normalized(folder: str) -> str:
    """A folder of a data set without ./ or / at its ends."""
    return str(PurePosixPath(folder.lstrip("/")))


def _is_empty_parquet(path: str) -> bool:
    """Whether a file is a table without rows, which the library refuses to read."""
    if not path.endswith(".parquet") or "://" in path:
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    with suppress(pa.ArrowException, OSError):  # a damaged file is left to the reader
        return bool(pq.read_metadata(path).num_rows == 0)
    return False


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
