"""What a configuration needs from the hub and from local folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flora_train.config.errors import Problem, UserError
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.data.hub_commits import HUB_PREFIX
from flora_train.data.sources import check_present
from flora_train.models.model_path import is_local, missing_folder
from flora_train.runtime.hub_probe import Repository

MOST_SHOWN = 8
"""Problems of local files that are shown one by one."""


@dataclass(frozen=True)
class Need:
    """A repository of the hub, and what needs it."""

    repository: Repository
    keys: tuple[str, ...]
    """Keys of the configuration that name it."""
    folders: tuple[str, ...] = ("",)
    """The folder of it that each key reads; "": all of it."""
    fallback_hint: str | None = None
    """What can replace it."""

    def without(self, cached: Callable[[str], bool]) -> Need | None:
        """What is left without the folders that are cached; None if all of them are."""
        rest = [(key, name) for key, name in zip(self.keys, self.folders, strict=True) if not cached(name)]
        if not rest:
            return None
        return replace(self, keys=tuple(key for key, _ in rest), folders=tuple(name for _, name in rest))

    @property
    def described(self) -> str:
        """`name (key and 8 more)`."""
        key = self.keys[0]
        if len(self.keys) > 1:
            key += f" and {len(self.keys) - 1} more"
        return f"{self.repository.name} ({key})"


def learnt_tasks(config: RunConfig) -> dict[str, TaskConfig]:
    """The tasks that some adapter learns. Others are not read."""
    names: set[str] = set()
    for adapter in config.adapters.values():
        names.update(adapter.tasks or config.tasks)
    return {name: task for name, task in config.tasks.items() if name in names}


def sources_of(config: RunConfig) -> Iterator[tuple[str, SourceConfig]]:
    """(key, source) of the rows that a run reads."""
    for name, task in learnt_tasks(config).items():
        for split, source in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            if source is not None:
                yield f"tasks.{name}.{split}", source


def hub_needs(config: RunConfig, *, with_tasks: bool = True, adapters: Sequence[str] = ()) -> list[Need]:
    """The repositories that a run reads; the base model is the first one.

    with_tasks: include the tasks' rows; adapters: PEFT adapters, folders or names on the hub.
    """
    needs: dict[tuple[str, str, str | None], Need] = {}
    for need in _needs(config, with_tasks, adapters):
        repository = need.repository
        key = (repository.type, repository.name, repository.revision)
        earlier = needs.get(key)
        if earlier is None:
            needs[key] = need
        elif need.keys[0] not in earlier.keys:
            needs[key] = Need(
                earlier.repository,
                (*earlier.keys, *need.keys),
                (*earlier.folders, *need.folders),
                earlier.fallback_hint or need.fallback_hint,
            )
    return list(needs.values())


def _needs(config: RunConfig, with_tasks: bool, adapters: Sequence[str]) -> Iterator[Need]:
    base = config.model
    if not is_local(base.path) and missing_folder(base.path) is None:
        repository = Repository("model", base.path, base.revision, file="config.json", with_sizes=True)
        yield Need(repository, ("model.path",))
    for entry in config.evaluation.problems:
        if entry.startswith(HUB_PREFIX) and any(task.language for task in config.tasks.values()):
            name = entry.removeprefix(HUB_PREFIX)
            yield Need(Repository("dataset", name), ("evaluation.problems",))
    if with_tasks:
        for key, source in sources_of(config):
            if source.hub is not None and not find_file(source.hub).exists():
                repository = _data_set(source)
                yield Need(repository, (f"{key}.hub",), (repository.file or "",), source.fallback_hint)
    for key, name in [*_starts(config), *(("contenders", name) for name in adapters)]:
        if not find_file(name).exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
            yield Need(Repository("model", name, file="adapter_config.json"), (key,))


def _data_set(source: SourceConfig) -> Repository:
    """Sizes are requested where all rows are downloaded."""
    folder = source.data_dir.strip("/") + "/" if source.data_dir else None
    return Repository(
        "dataset",
        str(source.hub),
        source.revision,
        file=folder,
        with_sizes=source.max_rows is None,
    )


def _starts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, name) of the adapters that those of the run start from."""
    for family, adapter in config.adapters.items():
        for source in adapter.over or ():
            yield f"adapters.{family}.over", source
        if adapter.init_from is None:
            continue
        for task in adapter.tasks or config.tasks:
            yield f"adapters.{family}.init_from", adapter.init_from.replace("{task}", task)


def missing_files(config: RunConfig, *, with_tasks: bool = True) -> list[Problem]:
    """Problems of local folders and files that do not exist; one for all sources that have the same one."""
    problems: list[Problem] = []
    base = missing_folder(config.model.path)
    if base is not None:
        problems.append(base)
    if not with_tasks:
        return problems
    same: dict[tuple[object, str], list[Problem]] = {}
    for key, source in sources_of(config):
        if source.hub is not None:
            continue
        try:
            check_present(source, key)
        except UserError as error:
            for problem in error.problems:
                same.setdefault((problem.value, problem.hint), []).append(problem)
    for first, *others in same.values():
        hint = first.hint
        if others:
            hint += f" (also for {len(others)} other sources)"
        problems.append(Problem(first.key, first.value, hint))
    left_out = problems[MOST_SHOWN:]
    if left_out:
        last = problems[MOST_SHOWN - 1]
        hint = f"{last.hint} (and {len(left_out):,} more like it)"
        problems[MOST_SHOWN - 1 :] = [Problem(last.key, last.value, hint)]
    return problems
