"""A report in which adapters that differ in their seed only are one method, with the mean over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from flora_train.evaluation.code.score_types import LanguageScores, MacroScores
from flora_train.evaluation.figures.result_types import FigureResult
from flora_train.evaluation.preferences.score_types import PreferenceResult
from flora_train.evaluation.report.types import AdapterFacts, Report, TaskResult
from flora_train.evaluation.speech.score_types import SpeechLanguage


class OfFamily(Protocol):
    """A row of results."""

    @property
    def family(self) -> str: ...


Row = TypeVar("Row", bound=OfFamily)
Part = TypeVar(
    "Part", TaskResult, LanguageScores, MacroScores, SpeechLanguage, PreferenceResult, FigureResult
)


def with_joined_seeds(report: Report) -> Report:
    """The report as it is shown. Names of adapters and the families of completions stay as they are."""
    families = seed_families(report.adapters)
    if not families:
        return report
    code = []
    for suite in report.code:
        languages = [_joined(part, families) for part in suite.languages]
        code.append(suite.replace(languages=languages, macro=_joined(suite.macro, families)))
    speech = report.speech
    if speech is not None:
        speech = speech.replace(languages=[_joined(part, families) for part in speech.languages])
    return report.replace(
        adapters=[
            adapter.replace(family=families.get(adapter.family, adapter.family), seeds_of=None)
            for adapter in report.adapters
        ],
        results=[_joined(part, families) for part in report.results],
        code=code,
        speech=speech,
        preferences=[_joined(part, families) for part in report.preferences],
        figures=[_joined(part, families) for part in report.figures],
    )


def note_on_seeds(report: Report) -> str | None:
    """The sentence on methods that are shown as means over seeds; None if there are none."""
    seeds: dict[str, dict[str, None]] = {}
    for adapter in report.adapters:
        if adapter.seeds_of is not None:
            seeds.setdefault(adapter.seeds_of, {})[str(adapter.seed)] = None
    if not seeds:
        return None
    methods = "; ".join(f"{family}: seeds {', '.join(of_family)}" for family, of_family in seeds.items())
    return (
        f"Means over seeds, with the standard deviation over them (±) beside the intervals over examples: "
        f"{methods}. No seed is better than another, so none is selected."
    )


def seed_families(adapters: Iterable[AdapterFacts]) -> dict[str, str]:
    """Family of an adapter of several seeds -> the family without its seed."""
    families = {}
    for adapter in adapters:
        if adapter.seeds_of is not None:
            families[adapter.family] = adapter.seeds_of
    return families


def adapters_of(report: Report, task: str, family: str) -> list[AdapterFacts]:
    """The adapters of a task that a row of results is of: one, or those of several seeds."""
    of_task = [adapter for adapter in report.adapters if adapter.task == task]
    return [adapter for adapter in of_task if family in (adapter.family, adapter.seeds_of)]


def _joined(part: Part, families: Mapping[str, str]) -> Part:
    differences = [
        pair for pair in part.differences if pair.first not in families and pair.second not in families
    ]
    contenders = _in_place_of_seeds(part.contenders, part.over_seeds, families)
    return part.replace(contenders=contenders, over_seeds=(), differences=differences)


def _in_place_of_seeds(rows: Sequence[Row], means: Sequence[Row], families: Mapping[str, str]) -> list[Row]:
    """The rows with each mean in the place of its first seed. Two tasks of a programming language may have a
    family in common: their means come in the order of their seeds."""
    waiting = list(means)
    placed: set[str] = set()
    shown: list[Row] = []
    for row in rows:
        family = families.get(row.family)
        if family is None:
            shown.append(row)
            continue
        if row.family in placed:  # the first seed of another task
            placed = {other for other in placed if families[other] != family}
        if not any(families[other] == family for other in placed):
            mean = next((mean for mean in waiting if mean.family == family), None)
            if mean is not None:
                waiting.remove(mean)
                shown.append(mean)
        placed.add(row.family)
    return shown
