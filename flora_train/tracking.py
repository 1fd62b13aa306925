"""Trackers besides metrics.jsonl: wandb and TensorBoard, through accelerate."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from flora_train.config.schema import RunConfig
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.config_changes import flat
from flora_train.runtime.distributed import is_main_process
from flora_train.runtime.manifest import PEFT_FILES
from flora_train.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)


def begin_tracking(accelerator: Any, config: RunConfig, folder: RunFolder) -> None:
    """Start the trackers. A resumed run continues at wandb under the id that it began with."""
    options = {}
    trackers = config.tracking.trackers
    if is_main_process():
        if "wandb" in trackers:
            options["wandb"] = {
                "name": config.name,
                "group": config.tracking.group,
                "dir": str(folder.path),
                "id": _wandb_id(folder),
                "resume": "allow",
            }
        folder.add_files(tracker_files(config, folder))
    with disk_errors(folder.path):
        accelerator.init_trackers(config.tracking.project, config=_scalars(config), init_kwargs=options)
    if "tensorboard" in trackers:
        logger.info(f"view metrics with: tensorboard --logdir {shlex.quote(str(folder.tensorboard))}")


def end_tracking(
    accelerator: Any, config: RunConfig, folder: RunFolder, *, metrics: Mapping[str, float], step: int
) -> None:
    """Log the final metrics. With tracking.artifacts, wandb also gets the report, and every adapter with its
    card.
    """
    accelerator.log(dict(metrics), step=step)
    if config.tracking.artifacts and "wandb" in config.tracking.trackers:
        _upload_artifacts(accelerator, config, folder)


def _upload_artifacts(accelerator: Any, config: RunConfig, folder: RunFolder) -> None:
    import wandb

    run = accelerator.get_tracker("wandb", unwrap=True)
    report = wandb.Artifact(f"{config.name}-report", type="report")
    for name in ("report.html", "report.json"):
        report.add_file(str(folder.evaluation / name))
    run.log_artifact(report)
    for name in config.adapter_names:
        artifact = wandb.Artifact(f"{config.name}-{name}", type="model")
        for path in (folder.adapters / name / file for file in PEFT_FILES):
            if path.exists():
                artifact.add_file(str(path))
        run.log_artifact(artifact)


def tracker_files(config: RunConfig, folder: RunFolder) -> list[str]:
    """The files that the trackers write into the run folder, as patterns of its manifest."""
    patterns = []
    if "wandb" in config.tracking.trackers:
        run = f"run-{{part}}-{_wandb_id(folder)}/{{rest}}"
        patterns += [f"wandb/{run}", f"wandb/offline-{run}", "wandb/latest-run"]
        patterns += ["wandb/debug.log", "wandb/debug-internal.log"]
    project = config.tracking.project
    if "tensorboard" in config.tracking.trackers and ".." not in project and not project.startswith("/"):
        logs, events = f"{folder.tensorboard.name}/{project}", "events.out.tfevents.{part}"
        patterns += [f"{logs}/{events}", f"{logs}/{{part}}/{events}", f"{logs}/hparams.yml"]
    return patterns


def _wandb_id(folder: RunFolder) -> str:
    """A hash of where and when the run began: a folder that is used again is another run."""
    begun = folder.facts().started
    return sha256(f"{folder.path.resolve()} {begun}".encode()).hexdigest()[:16]


def _scalars(config: RunConfig) -> dict[str, str | int | float]:
    """The configuration as dotted keys with plain values, as trackers require."""
    scalars: dict[str, str | int | float] = {}
    for key, value in flat(config.model_dump(mode="json")).items():
        scalars[key] = value if isinstance(value, (int, float)) else str(value)
    return scalars
