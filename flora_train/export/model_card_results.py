"""The results of an adapter for its card and for the hub, beside those of the base and of other methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from flora_train.evaluation.code.score_types import CodeScore, CodeSuite, LanguageScores
from flora_train.evaluation.figures.result_types import FigureResult, FigureScore
from flora_train.evaluation.figures.texts import key_of, text_of
from flora_train.evaluation.preferences.score_types import PreferenceResult, PreferenceScore
from flora_train.evaluation.report.figure_tables import figure_estimate, rows_of
from flora_train.evaluation.report.formatting import (
    PLUS_MINUS,
    estimate,
    mean_number,
    percent,
    plural,
    share_estimate,
)
from flora_train.evaluation.report.preference_figures import (
    METRIC_NAMES,
    FigureText,
    examples_of,
    figures_of,
    setting_of,
)
from flora_train.evaluation.report.types import ContenderResult, HeldoutScore, Report, TaskResult
from flora_train.evaluation.speech.score_types import Rate, SpeechLanguage, TranscriptionScore

HUB_NAMES = {"multipl_e": "nuprl/MultiPL-E"}
"""Suite of problems -> data set on the hub."""
RATES: dict[Rate, str] = {"wer": "WER", "wer_normalized": "normalised WER", "cer": "CER"}
"""Error rate -> its heading."""


class Contender(Protocol):
    """A row of results: the base or an adapter."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...


Row = TypeVar("Row", bound=Contender)


@dataclass(frozen=True)
class Table:
    """A table of a card, with a row for each contender."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    adapter_row: int
    """Index of the adapter's own row."""


@dataclass(frozen=True)
class CardMetric:
    """One metric of the adapter, for the hub."""

    dataset: str
    subset: str
    metric: str
    """pass@1, wer, bits_per_byte, or a figure of preferences, answers or labels."""
    value: float
    note: str
    """How it was measured, and on how many examples."""


def tables(report: Report | None, name: str) -> list[Table]:
    """Held-out bits per byte, rewards, figures, pass@k and error rates, as far as the report has them."""
    if report is None:
        return []
    heldout = [_heldout_table(result, name) for result, _ in _heldout_rows(report, name)]
    code = [_code_table(suite, part, name) for suite, part, _ in _code_rows(report, name)]
    speech = [_speech_table(part, name) for part, _ in _speech_rows(report, name)]
    preferences = [_preference_table(result, name) for result, _ in _preference_rows(report, name)]
    figures = [_figure_table(results, name) for results in _figure_rows(report, name)]
    return [*heldout, *preferences, *figures, *code, *speech]


def card_results(report: Report | None, name: str) -> list[CardMetric]:
    """Every metric of the adapter itself that is finite."""
    if report is None:
        return []
    return [
        *_heldout_metrics(report, name),
        *_preference_metrics(report, name),
        *_figure_metrics(report, name),
        *_code_metrics(report, name),
        *_speech_metrics(report, name),
    ]


def benchmarks(report: Report | None, name: str) -> list[dict[str, Any]]:
    """pass@1 in percent on suites that are data sets on the hub: the entries of its `.eval_results` files."""
    return [
        {
            "dataset": {"id": metric.dataset, "task_id": metric.subset},
            "value": round(100 * metric.value, 2),
            "notes": f"pass@1; {metric.note}",
        }
        for metric in card_results(report, name)
        if metric.dataset in HUB_NAMES.values() and metric.metric == "pass@1"
    ]


def _heldout_metrics(report: Report, name: str) -> Iterator[CardMetric]:
    for result, row in _heldout_rows(report, name):
        if row.bits_per_byte.value is not None:
            note = f"{result.examples} held-out examples"
            yield CardMetric(result.task, "held out", "bits_per_byte", row.bits_per_byte.value, note)


def _preference_metrics(report: Report, name: str) -> Iterator[CardMetric]:
    for result, row in _preference_rows(report, name):
        for text in figures_of(result):
            value = row.figure(text.figure)
            if value is not None and value.value is not None:
                note = f"{examples_of(result)}, {setting_of(result)}"
                yield CardMetric(
                    result.task, "held-out preferences", METRIC_NAMES[text.figure], value.value, note
                )


def _figure_metrics(report: Report, name: str) -> Iterator[CardMetric]:
    for results in _figure_rows(report, name):
        for result in results:
            value = next(row.value.value for row in result.contenders if row.name == name)
            if value is not None:
                note = f"{plural(result.examples, 'held-out example')}"
                if result.setting:
                    note += f", {result.setting}"
                yield CardMetric(result.task, "held out", key_of(result.figure), value, note)


def _code_metrics(report: Report, name: str) -> Iterator[CardMetric]:
    for suite, part, row in _code_rows(report, name):
        dataset, subset = suite.suite, part.language
        if suite.suite in HUB_NAMES:
            dataset, subset = HUB_NAMES[suite.suite], f"humaneval-{part.language}"
        for k in suite.pass_at_k:
            value = row.pass_at[k].value
            if value is not None:
                yield CardMetric(dataset, subset, f"pass@{k}", value, _sampling(suite, part))


def _speech_metrics(report: Report, name: str) -> Iterator[CardMetric]:
    for part, row in _speech_rows(report, name):
        value = row.rate(part.metric).value
        if value is not None:
            yield CardMetric(
                part.task, part.language, "wer", value, f"{part.clips} clips, {RATES[part.metric]}"
            )


def _heldout_table(result: TaskResult, name: str) -> Table:
    def bits_per_byte(row: HeldoutScore) -> str:
        return mean_number(row.bits_per_byte)

    level = percent(result.confidence).replace("\u00a0", " ")
    rows: list[HeldoutScore] = [result.base, *result.contenders]
    return _table(
        "Held-out loss",
        f"{result.examples} examples; {level} intervals of a paired bootstrap over them. Lower is better.",
        rows,
        name,
        cells={"bits per byte": bits_per_byte},
        to_base={
            row.family: estimate(row.difference_to_base) for row in (*result.contenders, *result.over_seeds)
        },
        means=result.over_seeds,
    )


def _preference_table(result: PreferenceResult, name: str) -> Table:
    def written(text: FigureText, row: PreferenceScore) -> str:
        value = row.figure(text.figure)
        if value is None:
            return ""
        return share_estimate(value) if text.in_percent else estimate(value, sign="")

    level = percent(result.confidence).replace("\u00a0", " ")
    shown = figures_of(result)[: 3 if result.is_paired else 2]
    meanings = "; ".join(f"{text.name}: {text.meaning}" for text in shown)
    note = (
        f"{examples_of(result)}, {setting_of(result)}; {level} intervals of a paired bootstrap over them; "
        f"the difference is that of the {shown[0].name}. {meanings[0].upper()}{meanings[1:]}. "
        "Shares are percentages, in which ties count one half. Higher is better."
    )
    return _table(
        "Held-out preferences",
        note,
        result.contenders,
        name,
        cells={text.name: partial(written, text) for text in shown},
        to_base={
            family: share_estimate(difference.reward_accuracy, "+")
            for family, difference in result.to_base.items()
        },
        means=result.over_seeds,
    )


def _figure_table(results: Sequence[FigureResult], name: str) -> Table:
    """A row for each contender and baseline of one task, a column for each figure."""

    def written(result: FigureResult, row: FigureScore) -> str:
        scores = {other.family: other for other, _ in rows_of(result)}
        if row.family not in scores:
            return ""
        return figure_estimate(scores[row.family].value, text_of(result))

    first = results[0]
    text = text_of(first)
    level = percent(first.confidence).replace("\u00a0", " ")
    directions = [f"{text_of(result).name}: {text_of(result).meaning}" for result in results]
    note = f"{plural(first.examples, 'example')}; {level} intervals of a paired bootstrap over them; "
    if first.to_base:
        note += f"the difference is that of the {text.name}. "
    note += f"{'; '.join(directions)}. "
    lower = [text_of(result).name for result in results if result.lower_is_better]
    note += f"Lower is better for {', '.join(lower)}. " if lower else ""
    note += "Shares are percentages."
    return _table(
        "Figures",
        note,
        [*first.contenders, *first.baselines],
        name,
        cells={text_of(result).name: partial(written, result) for result in results},
        to_base={
            family: figure_estimate(difference, text, "+") for family, difference in first.to_base.items()
        },
        means=first.over_seeds,
    )


def _code_table(suite: CodeSuite, part: LanguageScores, name: str) -> Table:
    def pass_at(k: int, row: CodeScore) -> str:
        return estimate(row.pass_at[k], sign="")

    level = percent(suite.confidence).replace("\u00a0", " ")
    first = suite.pass_at_k[0]
    return _table(
        f"Programs that pass their tests: {suite.suite}, {part.name}",
        f"{_sampling(suite, part)}; {level} intervals over problems. Higher is better.",
        part.contenders,
        name,
        cells={f"pass@{k}": partial(pass_at, k) for k in suite.pass_at_k},
        to_base={family: estimate(difference[first]) for family, difference in part.to_base.items()},
        means=part.over_seeds,
    )


def _speech_table(part: SpeechLanguage, name: str) -> Table:
    def rate_of(rate: Rate, row: TranscriptionScore) -> str:
        return estimate(row.rate(rate), sign="")

    return _table(
        "Error rates of words and characters",
        f"{part.clips} clips; the difference is that of the {RATES[part.metric]}. Lower is better.",
        part.contenders,
        name,
        cells={title: partial(rate_of, rate) for rate, title in RATES.items()},
        to_base={
            family: estimate(difference.rate(part.metric)) for family, difference in part.to_base.items()
        },
        means=part.over_seeds,
    )


def _table(
    title: str,
    note: str,
    contenders: Sequence[Row],
    name: str,
    *,
    cells: Mapping[str, Callable[[Row], str]],
    to_base: Mapping[str, str],
    means: Sequence[Row],
) -> Table:
    """cells: heading -> text of a contender; to_base: family -> text of its difference to the base; means:
    over seeds, which follow the contenders."""
    rows = []
    mean_families = {row.family for row in means}
    if means:
        note += f" {PLUS_MINUS}: standard deviation over seeds."
    for contender in (*contenders, *means):
        label = "base model" if contender.family == "base" else contender.family
        if contender.family in mean_families:
            label += ", mean over seeds"
        texts = [write(contender) for write in cells.values()]
        if to_base:
            texts.append(to_base.get(contender.family, ""))
        rows.append((label, *texts))
    own = [index for index, contender in enumerate(contenders) if contender.name == name]
    columns = ["", *cells]
    if to_base:  # a base without a head predicts no labels
        columns.append("difference to the base")
    return Table(title, note, tuple(columns), tuple(rows), own[0])


def _heldout_rows(report: Report, name: str) -> list[tuple[TaskResult, ContenderResult]]:
    return [(result, row) for result in report.results for row in result.contenders if row.name == name]


def _preference_rows(report: Report, name: str) -> Iterator[tuple[PreferenceResult, PreferenceScore]]:
    for result in report.preferences:
        for row in result.contenders:
            if row.name == name:
                yield result, row


def _figure_rows(report: Report, name: str) -> Iterator[list[FigureResult]]:
    """The figures of each task that the adapter takes part in, those of the same examples together."""
    groups: dict[tuple[str, int, str], list[FigureResult]] = {}
    for result in report.figures:
        if any(row.name == name for row in result.contenders):
            groups.setdefault((result.task, result.examples, result.setting), []).append(result)
    yield from groups.values()


def _code_rows(report: Report, name: str) -> Iterator[tuple[CodeSuite, LanguageScores, CodeScore]]:
    for suite in report.code:
        for part in suite.languages:
            for row in part.contenders:
                if row.name == name:
                    yield suite, part, row


def _speech_rows(report: Report, name: str) -> Iterator[tuple[SpeechLanguage, TranscriptionScore]]:
    if report.speech is not None:
        for part in report.speech.languages:
            for row in part.contenders:
                if row.name == name:
                    yield part, row


def _sampling(suite: CodeSuite, part: LanguageScores) -> str:
    samples = plural(suite.num_samples, "completion")
    return (
        f"{part.problems} of {part.available} problems, "
        f"{samples} each of up to {suite.max_new_tokens} tokens "
        f"at temperature {suite.temperature:g}"
    )
