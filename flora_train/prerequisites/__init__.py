"""Checks before a run, without torch: hub, login, terms, files, memory, GPU and disk, in one answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from flora_train.config.errors import UserError
from flora_train.config.load import load_saved
from flora_train.config.run_overrides import with_overrides
from flora_train.config.schema import RunConfig
from flora_train.prerequisites.alternatives import what_runs_instead
from flora_train.prerequisites.base_size import size_of_base
from flora_train.prerequisites.findings import Findings
from flora_train.prerequisites.hub import check_hub
from flora_train.prerequisites.needs import Need, hub_needs, learnt_tasks, missing_files
from flora_train.prerequisites.resources import check_disk, check_resources, process_counts
from flora_train.prerequisites.trackers import check_trackers
from flora_train.runtime.run_files import RunFiles

logger = logging.getLogger(__name__)


def check_prerequisites(
    config: RunConfig, *, trains: bool = True, with_tasks: bool = True, adapters: Sequence[str] = ()
) -> None:
    """Raises one UserError with all that is missing for a run, before anything is downloaded.

    Only the first process of each machine checks; the others wait for it when they join. Where a run has
    several machines, call it once they have joined: a machine that ended would leave the others waiting.

    Args:
        config: The run.
        trains: Whether it trains, rather than evaluates what was trained.
        with_tasks: Whether it reads the tasks' rows.
        adapters: PEFT adapters that it loads, folders or names on the hub.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" or (trains and is_finished(config)):
        return
    findings, needs = find_missing(config, trains=trains, with_tasks=with_tasks, adapters=adapters)
    for note in findings.notes:
        logger.warning(note)
    findings.suggests_smaller &= trains  # a run that exists has no smaller one
    raise_missing(config, findings, needs)


def spans_machines() -> bool:
    """Whether this process belongs to a run that has several machines."""
    local, everywhere = process_counts()
    return everywhere > local


def check_saved_run(
    run: str, overrides: Sequence[str] = (), *, with_tasks: bool, adapters: Sequence[str] = ()
) -> None:
    """`check_prerequisites` for a command that loads a run on disk; what is wrong with its folder or the
    overrides is left to that command."""
    try:
        config = with_overrides(load_saved(RunFiles(Path(run)).config), overrides)
    except (UserError, OSError):
        return
    check_prerequisites(config, trains=False, with_tasks=with_tasks, adapters=adapters)


def find_missing(
    config: RunConfig, *, trains: bool = True, with_tasks: bool = True, adapters: Sequence[str] = ()
) -> tuple[Findings, list[Need]]:
    """What is missing, and what is needed from the hub. Arguments as of `check_prerequisites`."""
    findings = Findings()
    files = missing_files(config, with_tasks=with_tasks)
    findings.lacks_base = any(problem.key == "model.path" for problem in files)
    needs = hub_needs(config, with_tasks=with_tasks, adapters=adapters)
    answers = check_hub(needs, findings)
    findings.problems += files
    findings.suggests_smaller |= any(".common_voice" in problem.key for problem in files)
    if trains:
        check_trackers(config, findings)
    base = size_of_base(config.model, answers)
    check_resources(config, base, findings, trains=trains)
    if needs:
        check_disk(answers, base, findings)
    return findings, needs


def raise_missing(config: RunConfig, findings: Findings, needs: Sequence[Need]) -> None:
    """Raises UserError if something is missing, with what runs here instead where that helps."""
    if not findings.problems:
        return
    advice = what_runs_instead(config, needs) if findings.suggests_smaller else None
    raise UserError(*findings.problems, advice=advice)


def is_finished(config: RunConfig) -> bool:
    """Whether resume=true would only show the results of a run that is finished."""
    files = RunFiles(Path(config.folder))
    return config.resume and files.finished and not _has_new_tasks(config, files)


def _has_new_tasks(config: RunConfig, files: RunFiles) -> bool:
    """Whether a task is learnt that the finished run does not have."""
    recorded = files.known_facts.get("data")
    if not isinstance(recorded, dict):
        return True
    for name, task in learnt_tasks(config).items():
        is_known = name in recorded
        if task.is_split:
            is_known = any(other.startswith(f"{name}_") for other in recorded)
        if not is_known:
            return True
    return False
