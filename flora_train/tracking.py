"""Where do metrics go besides metrics.jsonl? To wandb and tensorboard, through accelerate: named, grouped, taken up again under the same id, with the results and,
where that is asked for, the report and the adapters at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def end_tracking(accelerator: Any, config: RunConfig, folder: RunFolder, results: Mapping[str, Any], step: int) -> None:
    """Log what the report found. With tracking.artifacts wandb gets the report, and every adapter with its card."""
    accelerator.log(dict(final_figures(results)), step=step)
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


def final_figures(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`final/<task>/<method>/<figure>` of base and adapters: bits_per_byte, pass@k, wer."""
    found: list[tuple[str, float | None]] = []
    for result in results["results"]:
        for row in (result["base"], *result["contenders"]):
            found.append((f"final/{result['task']}/{row['family']}/bits_per_byte", row["bits_per_byte"]["value"]))
    for suite in results["code"]:
        for part in suite["languages"]:
            for row in part["contenders"]:
                key = f"final/{suite['suite']}/{part['language']}/{row['family']}"
                found += [(f"{key}/pass@{k}", estimate["value"]) for k, estimate in row["pass_at"].items()]
    for part in (results["speech"] or {}).get("languages", ()):
        for row in part["contenders"]:
            found.append((f"final/{part['task']}/{row['family']}/wer", row[part["metric"]]["value"]))
    return ((key, value) for key, value in found if value is not None)


def _identity(folder: RunFolder) -> str:
    """Of where and when the run was begun: a folder that is used again is another run."""
    begun = folder.facts().get("started", "")
    return sha256(f"{folder.path.resolve()} {begun}".encode()).hexdigest()[:16]


def _scalars(config: RunConfig) -> dict[str, str | int | float]:
    """Dotted keys and plain values, as trackers want them."""
    keys = flat(config.model_dump(mode="json"))
    return {key: value if isinstance(value, (int, float)) else str(value) for key, value in keys.items()}
