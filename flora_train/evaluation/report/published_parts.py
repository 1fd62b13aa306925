"""What a run measured by the metric of a published table, language by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flora_train.config.adapter_schema import adapter_name
from flora_train.evaluation.code.problems.suites import STARTER
from flora_train.evaluation.code.score_types import CodeSuite, LanguageScores
from flora_train.evaluation.report.published import PublishedTable
from flora_train.evaluation.report.types import AdapterFacts, Report, TaskSummary
from flora_train.evaluation.result_model import Interval
from flora_train.evaluation.speech.score_types import Rate, SpeechLanguage, SpeechResults

BASE = "base"
RATES: dict[str, tuple[Rate, str]] = {
    "wer": ("wer", "Word error rate as written"),
    "wer_normalized": ("wer_normalized", "Word error rate, normalised"),
    "cer": ("cer", "Character error rate, normalised"),
}
"""Metric of a published table -> the run's rate, and its name for readers."""


@dataclass(frozen=True)
class Contender:
    """The base or an adapter."""

    name: str
    family: str
    value: Interval
    difference: Interval | None
    """To the base; None of the base."""
    adapter: AdapterFacts | None
    """None of the base, and of adapters that the run did not train."""


@dataclass(frozen=True)
class MeasuredPart:
    """The figures of one language."""

    language: str
    """Its key in the published table."""
    name: str
    """For readers."""
    task: str | None
    """Of speech: the task whose clips were transcribed."""
    contenders: Sequence[Contender]
    used: int
    """Problems or clips."""
    available: int
    samples: int | None = None
    """Completions of each problem."""


@dataclass(frozen=True)
class Measured:
    """Everything that a run measured by one metric."""

    metric: str
    """Such as `pass@1 on multipl_e problems`."""
    parts: Sequence[MeasuredPart]
    confidence: float
    temperature: float | None = None

    def common(self, table: PublishedTable) -> list[MeasuredPart]:
        """The parts whose language the table has."""
        return [part for part in self.parts if part.language in table.results]


def measured_by(report: Report, table: PublishedTable) -> list[Measured]:
    """What the run measured by the table's metric: for pass@k, on each suite of such problems."""
    adapters = {adapter.name: adapter for adapter in report.adapters}
    for adapter in report.adapters:  # means over seeds, which have the name of none of them
        adapters.setdefault(adapter_name(adapter.task, adapter.family), adapter)
    if table.k is not None:
        return [
            _of_suite(suite, table.k, adapters)
            for suite in report.code
            if is_of_kind(suite, table) and table.k in suite.pass_at_k
        ]
    if report.speech is None:
        return []
    return [_of_speech(report.speech, table, adapters, tasks=report.tasks)]


def is_of_kind(suite: CodeSuite, table: PublishedTable) -> bool:
    """Whether a suite has the table's kind of problems. All but the starter problems are MultiPL-E's."""
    return (suite.source == STARTER) == (table.problems == STARTER)


def _of_suite(suite: CodeSuite, k: int, adapters: Mapping[str, AdapterFacts]) -> Measured:
    parts = [_code_part(part, k, adapters) for part in suite.languages]
    metric = f"pass@{k} on {suite.suite} problems"
    return Measured(metric, parts, suite.confidence, suite.temperature)


def _code_part(part: LanguageScores, k: int, adapters: Mapping[str, AdapterFacts]) -> MeasuredPart:
    # one for each adapter, in the same order: two tasks of a language may have a family in common
    to_base = iter([row.pass_at[k] for row in part.differences if row.second == BASE])
    contenders = []
    for row in part.contenders:
        difference = None if row.family == BASE else next(to_base, None)
        contenders.append(Contender(row.name, row.family, row.pass_at[k], difference, adapters.get(row.name)))
    return MeasuredPart(
        language=part.language,
        name=part.name,
        task=None,
        contenders=contenders,
        used=part.problems,
        available=part.available,
        samples=min((row.samples for row in part.contenders), default=None),
    )


def _of_speech(
    speech: SpeechResults,
    table: PublishedTable,
    adapters: Mapping[str, AdapterFacts],
    *,
    tasks: Sequence[TaskSummary],
) -> Measured:
    rate, metric = RATES[table.metric]
    unsampled = {task.name: task.test.unsampled for task in tasks if task.test is not None}
    languages = [part.language.lower() for part in speech.languages]
    parts = []
    for part, language in zip(speech.languages, languages, strict=True):
        name = table.names.get(language, language)
        if languages.count(language) > 1:
            name += f" ({part.task})"
        parts.append(
            MeasuredPart(
                language=language,
                name=name,
                task=part.task,
                contenders=_transcribers(part, rate, adapters),
                used=part.clips,
                available=part.clips + unsampled.get(part.task, 0),
            )
        )
    return Measured(metric, parts, speech.confidence)


def _transcribers(part: SpeechLanguage, rate: Rate, adapters: Mapping[str, AdapterFacts]) -> list[Contender]:
    contenders = []
    for row in part.contenders:
        difference = None
        if row.family in part.to_base:
            difference = part.to_base[row.family].rate(rate)
        contenders.append(Contender(row.name, row.family, row.rate(rate), difference, adapters.get(row.name)))
    return contenders
