"""Checks, before anything long begins, that all results of an earlier evaluation in a run folder can be read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from flora_train.adapters.spec import expand
from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.schema import RunConfig
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.evaluate import Plan
from flora_train.evaluation.code.evaluate import settings_of as code_settings
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.verdicts import read_verdicts
from flora_train.evaluation.code.summary import read_summary
from flora_train.evaluation.speech.evaluate import settings_of as speech_settings
from flora_train.evaluation.speech.evaluate import transcript_log
from flora_train.evaluation.speech.summary import read_summary as read_error_rates
from flora_train.runtime.run_folder import RunFolder


def check_places(folders: Iterable[Path] = (), files: Iterable[Path] = ()) -> None:
    """Raises UserError if something else is there than a folder, or a file, or nothing."""
    wrong = [(path, "folder") for path in folders if path.exists() and not path.is_dir()]
    wrong += [(path, "file") for path in files if path.exists() and not path.is_file()]
    for path, kind in wrong:
        raise user_error(str(path), None, f"is in the way of a {kind} of this name, which will be written: move it away")


def check_evaluation(folder: Path, suites: Mapping[str, Mapping[str, Language]], config: RunConfig) -> None:
    """folder: where the evaluation of a run is written; suites: name -> its languages that run here. Raises UserError for the first file
    that is damaged, for a place that cannot be written because something else is there, and for completions or transcripts that were made
    with other settings."""
    sandbox = config.evaluation.sandbox
    check_places(folders=[folder, *(folder / suite for suite in suites)], files=[folder / "report.json", folder / "report.html"])
    for suite, languages in suites.items():
        log = CompletionLog(folder / suite)
        log.read()
        if languages:
            log.check({"problems": suite, **code_settings(config)})
        read_summary(log.path)
        try:
            read_verdicts(log.verdicts, sandbox, languages)
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            hint = "delete it, and the programs are executed again"
            raise user_error(str(log.verdicts), None, f"is damaged ({first_line(error)}): {hint}") from error
    transcripts = transcript_log(folder)
    transcripts.read()
    transcripts.check(speech_settings(config))
    read_error_rates(folder)


def check_saved(folder: RunFolder, config: RunConfig, plan: Plan | None) -> None:
    """Raises UserError if something that the run's evaluation will read is damaged, or in the way of what it will write."""
    suites = {suite.name: plan.languages for suite in plan.suites} if plan else {}
    check_evaluation(folder.evaluation, suites, config)
    check_places(folders=[folder.adapters, *(folder.adapters / spec.name for spec in expand(config))])
