"""The commits of the hub repositories that a run reads: resolved once, recorded, read again by the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig
from flora_train.runtime.hub_snapshot import (
    HubError,
    RepoType,
    forget_commits,
    open_snapshot,
    pin_commits,
    pin_key,
    pinned_commits,
)

logger = logging.getLogger(__name__)

HUB_PREFIX = "hub:"
"""Start of an entry of evaluation.problems that names a data set on the hub."""


def resolve_commits(config: RunConfig, recorded: Mapping[str, str]) -> dict[str, str]:
    """Resolve the revisions that a run reads. recorded: the commits with which it began.

    What cannot be resolved is left out; whatever reads it raises its error.
    """
    forget_commits()
    pin_commits(recorded)
    for name, revision, repo_type in dict.fromkeys(_repositories(config)):
        with suppress(HubError):
            open_snapshot(name, revision, repo_type)
    commits = commits_of(config)
    for key, commit in commits.items():
        logger.info(f"{key} is read at commit {commit[:12]}")
    return commits


def commits_of(config: RunConfig) -> dict[str, str]:
    """`models/ORG/NAME@REVISION` or `datasets/ORG/NAME@REVISION` -> commit, of what this run has read."""
    keys = {pin_key(*repository) for repository in _repositories(config)}
    return {key: commit for key, commit in pinned_commits().items() if key in keys}


def _repositories(config: RunConfig) -> Iterator[tuple[str, str | None, RepoType]]:
    """(name, revision, type) of each repository that the run reads; tasks that no adapter learns are not
    read."""
    if not _is_local(config.model.path):
        yield config.model.path, config.model.revision, "model"
    for adapter in config.adapters.values():
        if adapter.init_from is not None and not _is_local(adapter.init_from):
            yield adapter.init_from, None, "model"
        for member in adapter.over or ():
            if "/" in member and not _is_local(member):
                yield member, None, "model"
    learnt: set[str] = set()
    for adapter in config.adapters.values():
        learnt.update(adapter.tasks or config.tasks)
    for task_name, task in config.tasks.items():
        if task_name not in learnt and task.split_by is None:
            continue
        for source in (task.train, task.validation, task.test):
            if source is not None and source.hub is not None and not Path(source.hub).is_dir():
                yield source.hub, source.revision, "dataset"
    problems = config.evaluation.problems or []
    for entry in [problems] if isinstance(problems, str) else problems:
        if entry.startswith(HUB_PREFIX):
            yield entry.removeprefix(HUB_PREFIX), None, "dataset"


def _is_local(path: str) -> bool:
    return find_file(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
