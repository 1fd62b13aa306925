"""flora-train evaluate: evaluates the saved adapters of a run again, also on other data."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

from flora_train.config.load import save_config
from flora_train.config.run_overrides import changed_tasks, with_overrides
from flora_train.config.schema import RunConfig
from flora_train.evaluation.answers.figures import check_metrics
from flora_train.evaluation.code.evaluate import Plan, plan_evaluation
from flora_train.evaluation.figures.own_labels import check_label_metrics
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.terminal import show
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.saved_files import check_saved
from flora_train.final_evaluation import run_final_evaluation
from flora_train.run_context import load_run, locked, note_differences
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.distributed import on_main_process
from flora_train.runtime.manifest import RUN_FILES, suite_files
from flora_train.runtime.run_folder import RunFolder, open_run
from flora_train.training.origin import OriginOptions


def evaluate_run(
    run: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    allow_different_base: bool = False,
    allow_different_data: bool = False,
) -> Report:
    """Evaluate the saved adapters of a run again.

    Args:
        run: The folder of the run.
        overrides: `evaluation.KEY=VALUE` and `tasks.TASK.KEY=VALUE`, instead of the run's own, for instance
            `tasks.lua.validation=other.jsonl`. Results then go to a folder of their own in the run, and those
            of the run stay.
        allow_different_base: Accept another base model than the run was trained on. Results say so.
        allow_different_data: Accept other rows than the run was trained on. Results say so.

    Returns:
        The report, as pydantic models.

    Raises:
        UserError: If base or data are not those of the run and that is not allowed, or for a wrong override.
    """
    allow = OriginOptions(
        allow_different_base=allow_different_base, allow_different_data=allow_different_data
    )
    folder = _evaluate(os.fspath(run), overrides, allow)
    return on_main_process(lambda: read_report(folder))


def evaluate_and_show(run: str, overrides: Sequence[str], *, allow: OriginOptions) -> None:
    """`evaluate_run`, with the results on the terminal."""
    folder = _evaluate(run, overrides, allow)
    on_main_process(lambda: show(folder))


def _evaluate(run: str, overrides: Sequence[str], allow: OriginOptions) -> RunFolder:
    """Returns the folder with the results."""
    config = with_overrides(open_run(run)[1], overrides)
    with locked(run) as folder:
        plan = on_main_process(lambda: plan_evaluation(config, need_sandbox=False))
        on_main_process(lambda: check_metrics(config))
        results = _folder_of(config, folder) if overrides else folder
        if overrides:
            on_main_process(lambda: _claim(results, folder, config, plan))
        on_main_process(lambda: check_saved(results, config, plan, restart=bool(overrides)))
        on_main_process(folder.check_metrics)
        context, saved = load_run(
            run, with_tasks=True, allow=allow, overridden=config, changed_tasks=changed_tasks(overrides)
        )
        on_main_process(lambda: check_label_metrics(config, context.tasks))
        changes = [f"Evaluated with {word}." for word in overrides]
        context = replace(context, folder=results, differences=(*changes, *context.differences))
        on_main_process(lambda: note_differences(folder, "evaluate", context.differences))
        if not overrides:
            on_main_process(lambda: folder.add_files([*RUN_FILES, *_suite_files(plan)]))
        run_final_evaluation(context, saved, plan, publish=not overrides)
        return results


def _folder_of(config: RunConfig, folder: RunFolder) -> RunFolder:
    """The run's folder with an evaluation folder for this configuration, so that results of different
    settings are not mixed."""
    settings = config.model_dump(mode="json", include={"evaluation", "tasks"})
    results = copy.copy(folder)
    results.evaluation = folder.path / f"eval-{sha256(json.dumps(settings).encode()).hexdigest()[:8]}"
    results.config = results.evaluation / "config.yaml"
    return results


def _claim(results: RunFolder, folder: RunFolder, config: RunConfig, plan: Plan | None) -> None:
    """Record the configuration of an evaluation in its folder, and its files in the run's manifest."""
    name = results.evaluation.name
    files = [file for file in (*RUN_FILES, *_suite_files(plan)) if file.startswith("eval/")]
    folder.add_files([f"{name}/config.yaml", *(file.replace("eval/", f"{name}/", 1) for file in files)])
    write_atomically(results.config, lambda path: save_config(config, path))


def _suite_files(plan: Plan | None) -> list[str]:
    if plan is None:
        return []
    return suite_files(suite.name for suite in plan.suites)
