"""flora-train evaluate: evaluate a run's kept adapters again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flora_train.config.command_options import read_options
from flora_train.config.errors import user_error
from flora_train.config.overrides import from_flags, parse_words
from flora_train.evaluation.code.evaluate import plan_evaluation
from flora_train.evaluation.report.results import read_report
from flora_train.evaluation.report.terminal import (
    show,
)
from flora_train.evaluation.saved_files import check_saved
from flora_train.final_evaluation import judge
from flora_train.run_context import (
    load_run,
    locked,
    note_differences,
)
from flora_train.runtime.distributed import (
    on_main_process,
)
from flora_train.runtime.manifest import suite_files
from flora_train.runtime.run_folder import open_run
from flora_train.training.origin import SWITCHES, OriginOptions


def evaluate_words(words: Sequence[str]) -> None:
    """words: a run, and OriginOptions. Raises UserError."""
    runs, raw = from_flags(words, switches=SWITCHES)
    options = read_options(OriginOptions, parse_words(raw))
    if len(runs) != 1:
        raise user_error("run", " ".join(runs) or None, "give one run: a folder in outputs/")
    evaluate_run(runs[0], **options.model_dump())
    show(open_run(runs[0])[0])


def evaluate_run(run: str, **allow: bool) -> dict[str, Any]:
    """Judge a run's kept adapters again and rewrite its report, whose content is returned. allow: see OriginOptions.

    Raises UserError if the base or the data is not what the run was trained with, and that is not allowed.
    """
    options = OriginOptions(**allow)
    with locked(run) as folder:
        config = open_run(run)[1]
        plan = on_main_process(lambda: plan_evaluation(config, need_sandbox=False))
        on_main_process(lambda: check_saved(folder, config, plan))
        on_main_process(folder.check_metrics)
        session, kept = load_run(run, with_tasks=True, allow=options)
        on_main_process(lambda: note_differences(folder, "evaluate", session.differences))
        on_main_process(lambda: folder.add_files(suite_files(suite.name for suite in plan.suites) if plan else []))
        judge(session, kept, plan)
        return on_main_process(lambda: read_report(session.folder))
