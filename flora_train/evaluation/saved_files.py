"""Checks that the results of an earlier evaluation in a run folder can be read, before a new one starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from flora_train.adapters.spec import expand
from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.schema import RunConfig
from flora_train.evaluation.answers.journal import AnswerLog
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.evaluate import Plan
from flora_train.evaluation.code.evaluate import settings_of as code_settings
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.verdicts import have_other_limits, read_verdicts
from flora_train.evaluation.code.summary import read_summary
from flora_train.evaluation.figures.prediction_files import FOLDER as PREDICTIONS
from flora_train.evaluation.speech.evaluate import settings_of as speech_settings
from flora_train.evaluation.speech.evaluate import transcript_log
from flora_train.evaluation.speech.summary import read_summary as read_error_rates
from flora_train.runtime.run_folder import RunFolder


def check_paths(folders: Iterable[Path] = (), files: Iterable[Path] = ()) -> None:
    """Raises UserError if one of the folders exists as something else, or one of the files."""
    wrong = [(path, "folder") for path in folders if path.exists() and not path.is_dir()]
    wrong += [(path, "file") for path in files if path.exists() and not path.is_file()]
    for path, expected in wrong:
        hint = f"is in the way of a {expected} of this name, which will be written: move it away"
        raise user_error(str(path), None, hint)


def check_evaluation(
    folder: Path, suites: Mapping[str, Mapping[str, Language]], config: RunConfig, *, restart: bool = False
) -> None:
    """Raises UserError for damaged files, other files in their place, and results made with other settings.

    folder: where the evaluation is written. suites: suite -> its languages that can be executed.
    restart: accept results made with other settings, as they will be deleted.
    """
    sandbox = config.evaluation.sandbox
    report_files = [folder / "report.json", folder / "report.html"]
    answers = AnswerLog(folder)
    check_paths(
        folders=[folder, folder / PREDICTIONS, answers.path, *(folder / suite for suite in suites)],
        files=report_files,
    )
    for suite, languages in suites.items():
        log = CompletionLog(folder / suite)
        settings = {"problems": suite, **code_settings(config)}
        if restart and log.has_other_settings(settings, partial=True):
            continue
        log.read()
        if languages:
            log.check(settings)
        read_summary(log.path)
        if not (restart and have_other_limits(log.verdicts, sandbox, languages)):
            _check_verdicts(log.verdicts, config, languages)
    answers.read()
    transcripts = transcript_log(folder)
    if not (restart and transcripts.has_other_settings(speech_settings(config), partial=True)):
        transcripts.read()
        transcripts.check(speech_settings(config))
    read_error_rates(folder)


def check_saved(folder: RunFolder, config: RunConfig, plan: Plan | None, *, restart: bool = False) -> None:
    """Raises UserError if files that the run's evaluation reads are damaged, or something is in the way of
    its results.
    """
    suites = {}
    if plan is not None:
        suites = {suite.name: plan.languages for suite in plan.suites}
    check_evaluation(folder.evaluation, suites, config, restart=restart)
    check_paths(folders=[folder.adapters, *(folder.adapters / spec.name for spec in expand(config))])


def _check_verdicts(file: Path, config: RunConfig, languages: Mapping[str, Language]) -> None:
    try:
        read_verdicts(file, config.evaluation.sandbox, languages)
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        hint = f"is damaged ({first_line(error)}): delete it, and the programs are executed again"
        raise user_error(str(file), None, hint) from error
