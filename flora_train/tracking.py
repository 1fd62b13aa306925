"""Where do metrics go besides metrics.jsonl? To wandb and tensorboard, through accelerate: named, grouped, taken up again under the same id, with the results and,
where that is asked for, the report and the adapters at the end."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from flora_train.config.schema import RunConfig
from flora_train.runtime.atomic import disk_errors
from flora_train.runtime.distributed import is_main_process
from flora_train.runtime.manifest import PEFT_FILES
from flora_train.runtime.run_folder import RunFolder, flat


def begin_tracking(accelerator: Any, config: RunConfig, folder: RunFolder) -> None:
    """The run at its trackers. wandb knows a run by an id that stays the same when it is taken up again."""
    options = {}
    if "wandb" in config.tracking.trackers and is_main_process():
        named = {"name": config.name, "group": config.tracking.group, "dir": str(folder.path)}
        options["wandb"] = {**named, "id": _identity(folder), "resume": "allow"}
    if is_main_process():
        folder.add_files(tracker_files(config, folder))
    with disk_errors(folder.path):
        accelerator.init_trackers(config.tracking.project, config=_scalars(config), init_kwargs=options)


def end_tracking(accelerator: Any, config: RunConfig, folder: RunFolder, *, metrics: Mapping[str, float], step: int) -> None:
    """Log the final metrics. With tracking.artifacts, wandb also gets the report, and every adapter with its card."""
    accelerator.log(dict(metrics), step=step)
    if config.tracking.artifacts and "wandb" in config.tracking.trackers:
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
    """What the trackers write into the run folder, as its manifest names it."""
    found = []
    if "wandb" in config.tracking.trackers:
        run = f"run-{{part}}-{_identity(folder)}/{{rest}}"
        found += [f"wandb/{run}", f"wandb/offline-{run}", "wandb/latest-run", "wandb/debug.log", "wandb/debug-internal.log"]
    place = config.tracking.project
    if "tensorboard" in config.tracking.trackers and ".." not in place and not place.startswith("/"):
        events = "events.out.tfevents.{part}"
        found += [f"{place}/{events}", f"{place}/{{part}}/{events}", f"{place}/hparams.yml"]
    return found


def _identity(folder: RunFolder) -> str:
    """Of where and when the run was begun: a folder that is used again is another run."""
    begun = folder.facts().get("started", "")
    return sha256(f"{folder.path.resolve()} {begun}".encode()).hexdigest()[:16]


def _scalars(config: RunConfig) -> dict[str, str | int | float]:
    """Dotted keys and plain values, as trackers want them."""
    keys = flat(config.model_dump(mode="json"))
    return {key: value if isinstance(value, (int, float)) else str(value) for key, value in keys.items()}
