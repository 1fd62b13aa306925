"""A run with the section `federated`: rounds, report and exported global adapters."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.federated.build_report import build_report, read_federated_report, write_federated_report
from flora_train.federated.loaded import LoadedRun, load_federated
from flora_train.federated.report_page import write_page
from flora_train.federated.report_terminal import print_federated
from flora_train.federated.run import (
    PlannedRun,
    federated_of,
    plan_runs,
    probe_runs,
    train_runs,
)
from flora_train.federated.run_results import claim_folder, export_global, is_exported
from flora_train.federated.saved_run import read_saved, state_path
from flora_train.run_context import as_it_began, check_base, check_data
from flora_train.runtime.environment import dtype_of
from flora_train.runtime.run_folder import RunFolder, RunStatus
from flora_train.runtime.signals import Interrupted
from flora_train.training.origin import OriginOptions

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def train_federated(
    config: RunConfig, folder: RunFolder, accelerator: Accelerator, *, status: RunStatus
) -> None:
    """Run all rounds of a federated run, then report and export.

    Args:
        config: The run, resolved.
        folder: Its folder, which this process has locked.
        accelerator: Says how many processes there are, and on which device to train.
        status: What the run is for its folder.

    Raises:
        UserError: Bad input, before any round; or too few usable updates, with all earlier rounds saved.
        Interrupted: A signal; the rounds until then are saved.
    """
    if accelerator.num_processes > 1:
        hint = "federated rounds run in one process, in which all clients of a round train at once: start one"
        raise user_error("num_processes", accelerator.num_processes, hint)
    if status == "extended":
        raise user_error("tasks", None, "a finished federated run takes no more tasks: start another run")
    started = time.monotonic()
    if status != "new":
        check_base(folder, config, OriginOptions())
        config = as_it_began(config, folder)
    loaded = load_federated(config, folder, accelerator.device)
    if status != "new":
        check_data(folder, loaded.tasks, OriginOptions())
    planned = plan_runs(loaded)
    probe_runs(loaded, planned)
    claim_folder(loaded)
    federated, clients = federated_of(loaded), len(planned[0].population.clients)
    logger.info(
        f"{clients} clients, {federated.rounds} rounds, {len(planned)} runs of strategies, base in "
        f"{dtype_of(loaded.model)}, on {accelerator.device}"
    )
    try:
        train_runs(loaded, planned)
    except Interrupted as pause:
        folder.update_run_json(interrupted=pause.step)
        raise
    for own in planned:
        _export(loaded, own)
    write_federated_report(build_report(loaded, planned), folder.evaluation)
    show_federated(folder)
    folder.update_run_json(finished=True, seconds=time.monotonic() - started)


def show_federated(folder: RunFolder) -> Path:
    """Write the page of a federated run again and print its tables. Raises UserError without a report."""
    report = read_federated_report(folder)
    page = write_page(report, folder.evaluation)
    print_federated(report)
    logger.info(f"report: {page}")
    return page


def _export(loaded: LoadedRun, planned: PlannedRun) -> None:
    if not is_exported(planned.stages[-1]):
        return
    saved = read_saved(state_path(loaded.folder.path, planned.name))
    assert saved is not None
    strategy = planned.open(loaded)
    strategy.resume_from(saved)
    export_global(loaded, strategy)
