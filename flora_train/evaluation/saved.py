"""Can all that an earlier evaluation left in a run folder be read? Asked before anything long begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flora_train.config.errors import UserError, fail, first_line
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.sandbox import Kind
from flora_train.evaluation.code.programs.verdicts import read_verdicts
from flora_train.evaluation.code.summary import read_summary
from flora_train.evaluation.speech.evaluate import transcript_log
from flora_train.evaluation.speech.summary import read_summary as read_error_rates


def check_evaluation(folder: Path, suites: Mapping[str, Mapping[str, Language]], sandbox: Kind) -> None:
    """folder: where the evaluation of a run is written; suites: name -> its languages that run here. Raises UserError for the first file
    that is damaged."""
    for suite, languages in suites.items():
        log = CompletionLog(folder / suite)
        log.read()
        read_summary(log.path)
        try:
            read_verdicts(log.verdicts, sandbox, languages)
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            fix = "delete it, and the programs are executed again"
            raise fail(str(log.verdicts), None, f"is damaged ({first_line(error)}): {fix}") from error
    transcript_log(folder).read()
    read_error_rates(folder)
