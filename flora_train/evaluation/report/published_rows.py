"""Published tables beside the figures of a run: which of its adapters each published method stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.paths import read_mapping
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.report.formatting import listed
from flora_train.evaluation.report.published import Cell, PublishedResults, PublishedTable
from flora_train.evaluation.report.published_parts import (
    BASE,
    Contender,
    Measured,
    MeasuredPart,
    is_of_kind,
    measured_by,
)
from flora_train.evaluation.report.published_setup import (
    same_model,
    setup_differences,
    setup_sentence,
    task_languages,
)
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import Interval

METHODS = ("flora", "lora", "ia3")
"""In a published table these stand for all families of the method; other words for a family of that name."""
MOST_NAMES = 8


@dataclass(frozen=True)
class ComparedRow:
    """A published figure beside that of one family of the run. Rates are fractions."""

    language: str
    """For readers."""
    method: str
    """As published."""
    family: str
    """Of the run; the published method where the run has none."""
    rank: int | None
    """Of the run's adapter."""
    published: Cell | None
    published_difference: float | None
    """To the published base."""
    value: Interval | None
    difference: Interval | None
    """To the run's base, paired."""


@dataclass(frozen=True)
class ComparedTable:
    """A published table beside the figures of a run."""

    title: str
    source: str
    metric: str
    """Such as `pass@1 on multipl_e problems`."""
    lower_is_better: bool
    confidence: float
    rows: Sequence[ComparedRow]
    differs: Sequence[str]
    """How the run differs from the published set-up."""
    setup: str
    """`differs` as a sentence."""
    notes: Sequence[str]

    @property
    def by_language(self) -> dict[str, list[ComparedRow]]:
        """Language -> its rows."""
        groups: dict[str, list[ComparedRow]] = {}
        for row in self.rows:
            groups.setdefault(row.language, []).append(row)
        return groups


@dataclass(frozen=True)
class Reason:
    """Why a table does not fit a run."""

    text: str
    can_be_mended: bool


def beside_published(
    report: Report, published: PublishedResults, *, run: str, name: str
) -> list[ComparedTable]:
    """The published tables that fit a run, with its figures.

    run: the run's folder; name: of the published results as the user gave it. Raises UserError if no table
    fits.
    """
    config = run_config(report)
    tables: list[ComparedTable] = []
    reasons: list[Reason] = []
    for table in _candidates(report, published):
        measured = [one for one in measured_by(report, table) if one.common(table)]
        for one in measured:
            tables.append(_compared(report, config, table, one, source=published.source))
        if not measured:
            reasons.append(_why_not(report, config, table, run=run))
    if not tables:
        raise user_error("beside", name, f"has no table for this run: {'; '.join(_most_useful(reasons))}")
    return tables


def _most_useful(reasons: Iterable[Reason]) -> list[str]:
    """The reasons that the user can do something about, or else all."""
    listed_once = list(dict.fromkeys(reasons))
    useful = [reason.text for reason in listed_once if reason.can_be_mended]
    return useful or [reason.text for reason in listed_once]


def run_config(report: Report) -> dict[str, Any]:
    """The run's configuration; empty if it was not recorded. Raises UserError if it cannot be read."""
    if not report.facts.config.strip():
        return {}
    return read_mapping(report.facts.config, "the configuration in report.json")


def _candidates(report: Report, published: PublishedResults) -> list[PublishedTable]:
    """For each metric the tables of the run's model, or else all that are not for their model alone."""
    own = [table for table in published.tables if same_model(report.facts.model, table.setup.model)]
    metrics = {table.metric for table in own}
    chosen = []
    for table in published.tables:
        if table in own or not (table.metric in metrics or table.same_model_only):
            chosen.append(table)
    return chosen


def _compared(
    report: Report, config: Mapping[str, Any], table: PublishedTable, measured: Measured, *, source: str
) -> ComparedTable:
    rows: list[ComparedRow] = []
    shown: dict[str, list[Contender]] = {}
    left_out: dict[str, None] = {}
    for language, part in _languages(table, measured):
        name = _name(table, language) if part is None else part.name
        for method in table.methods:
            contenders = [] if part is None else _choose(report, table, part, method)
            shown.setdefault(language, []).extend(contenders)
            rows += _rows(table, language, method, contenders, name=name)
        if part is not None:
            left_out |= dict.fromkeys(_left_out(part, shown[language]))
    differs = setup_differences(report, config, table, measured, shown=shown)
    notes = [*table.notes, *table.doubts, *_notes(report, shown, left_out)]
    return ComparedTable(
        title=table.title,
        source=source,
        metric=measured.metric,
        lower_is_better=table.k is None,
        confidence=measured.confidence,
        rows=rows,
        differs=differs,
        setup=setup_sentence(table.setup, differs),
        notes=notes,
    )


def _languages(table: PublishedTable, measured: Measured) -> Iterator[tuple[str, MeasuredPart | None]]:
    """Languages in published order, then those of the run alone."""
    for language in table.results:
        parts = [part for part in measured.parts if part.language == language]
        yield from ((language, part) for part in parts)
        if not parts:
            yield language, None
    for part in measured.parts:
        if part.language not in table.results:
            yield part.language, part


def _name(table: PublishedTable, language: str) -> str:
    """A language's name for readers."""
    if language in table.names:
        return table.names[language]
    return language if table.k is None else _program_names().get(language, language)


@cache
def _program_names() -> dict[str, str]:
    return {key: entry.name for key, entry in load_languages().items()}


def _choose(report: Report, table: PublishedTable, part: MeasuredPart, method: str) -> list[Contender]:
    """The contenders that a published method stands for: of its rank, where the run has that, and of a sweep
    its winner by held-out loss."""
    if method not in METHODS:
        return [contender for contender in part.contenders if contender.family == method]
    chosen = []
    for contender in part.contenders:
        if contender.adapter is not None and contender.adapter.method == method:
            chosen.append(contender)
    rank = table.rank(part.language)
    of_rank = [one for one in chosen if one.adapter is not None and one.adapter.rank in (None, rank)]
    if rank is not None and of_rank:
        chosen = of_rank
    return _without_losers(report, chosen)


def _without_losers(report: Report, contenders: Sequence[Contender]) -> list[Contender]:
    """Of the members of a sweep only the one with the lowest held-out loss."""
    losers = set()
    for sweep in report.sweeps:
        measured = []
        for contender in contenders:
            member = sweep.by_family.get(contender.family)
            if member is not None and contender.adapter is not None and contender.adapter.task == sweep.task:
                loss = float("inf") if member.bits_per_byte is None else member.bits_per_byte
                measured.append((loss, contender.name))
        losers |= {name for _, name in sorted(measured)[1:]}
    return [contender for contender in contenders if contender.name not in losers]


def _rows(
    table: PublishedTable, language: str, method: str, contenders: Sequence[Contender], *, name: str
) -> Iterator[ComparedRow]:
    """One row for each contender; one without a figure of the run if there is none."""
    published = base = difference = None
    if language in table.results:
        published, base = table.fraction(language, method), table.fraction(language, BASE)
    if published is not None and base is not None and method != BASE:
        difference = round(published.mean - base.mean, 10)
    for contender in contenders:
        rank = None if contender.adapter is None else contender.adapter.rank
        yield ComparedRow(
            language=name,
            method=method,
            family=contender.family,
            rank=rank,
            published=published,
            published_difference=difference,
            value=contender.value,
            difference=contender.difference,
        )
    if not contenders:
        yield ComparedRow(name, method, method, None, published, difference, None, None)


def _left_out(part: MeasuredPart, shown: Sequence[Contender]) -> list[str]:
    names = {contender.name for contender in shown}
    return [contender.family for contender in part.contenders if contender.name not in names]


def _notes(
    report: Report, shown: Mapping[str, Sequence[Contender]], left_out: Mapping[str, None]
) -> Iterator[str]:
    families = {contender.family for contenders in shown.values() for contender in contenders}
    swept = {member.family for sweep in report.sweeps for member in sweep.members}
    if families & swept:
        yield "Of a sweep's settings the one with the lowest held-out loss stands in the table."
    hidden = [family for family in left_out if family not in families]
    partly = [family for family in left_out if family in families]
    if hidden:
        yield f"Not in the table, as it has no such method or another rank: {listed(hidden, MOST_NAMES)}."
    if partly:
        yield f"In the table only where their rank is the published one: {listed(partly, MOST_NAMES)}."


def _why_not(report: Report, config: Mapping[str, Any], table: PublishedTable, *, run: str) -> Reason:
    """Why a table does not fit, with what to do where something can be done."""
    trained = {adapter.task for adapter in report.adapters}
    learnt = {language for task, language in task_languages(config).items() if task in trained}
    common = [_name(table, language) for language in table.results if language in learnt]
    text = None
    if table.k is not None:
        text = _why_no_programs(report, table, common, run=run)
    elif report.speech is None and common:
        text = (
            f"the run has only held-out losses in {listed(common, MOST_NAMES)}: its tasks had no test split "
            "(tasks.NAME.test), so that no clip was transcribed"
        )
    if text is not None:
        return Reason(f"{table.title}: {text}", can_be_mended=True)
    names = listed([_name(table, language) for language in table.results], 2 * MOST_NAMES)
    return Reason(f"{table.title} is of {names}, and the run has none of these languages", False)


def _why_no_programs(report: Report, table: PublishedTable, common: Sequence[str], *, run: str) -> str | None:
    """common: the table's languages that the run's adapters learn. None: there are none."""
    suites = [suite for suite in report.code if is_of_kind(suite, table)]
    problems = "starter" if table.problems == "starter" else "hub:nuprl/MultiPL-E"
    solve = f"flora-train solve {run} evaluation.problems={problems}"
    if suites and not any(table.k in suite.pass_at_k for suite in suites):
        return f"the run has no {table.metric}: {solve} evaluation.pass_at_k=[{table.k}]"
    missing = {entry.language: entry.reason for suite in suites for entry in suite.not_evaluated}
    reasons = [f"{key}: {reason}" for key, reason in missing.items() if key in table.results]
    if reasons:
        return f"could not be evaluated here: {listed(reasons, MOST_NAMES)}"
    if not common:
        return None
    done = "were not executed"
    if report.code:
        done = f"were executed on the {listed([suite.suite for suite in report.code])} problems only"
    return f"the run's programs in {listed(common, MOST_NAMES)} {done}: {solve}"
