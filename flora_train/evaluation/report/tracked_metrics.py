"""The final metrics of a run, as experiment trackers log them."""

from __future__ import annotations

from flora_train.evaluation.figures.texts import key_of
from flora_train.evaluation.report.figure_tables import rows_of
from flora_train.evaluation.report.preference_figures import METRIC_NAMES, figures_of, values_of
from flora_train.evaluation.report.types import Report
from flora_train.evaluation.result_model import Interval


def final_metrics(report: Report) -> dict[str, float]:
    """`final/<task>/<method>/<metric>` -> value, of base and adapters: bits_per_byte, pass@k, wer,
    reward_accuracy and others of preferences, and the figures of answers and labels; of means over seeds also
    `<metric>_deviation`."""
    metrics: dict[str, float | None] = {}
    for result in report.results:
        for row in (result.base, *result.contenders, *result.over_seeds):
            _add(metrics, f"final/{result.task}/{row.family}/bits_per_byte", row.bits_per_byte)
    for suite in report.code:
        for part in suite.languages:
            for score in (*part.contenders, *part.over_seeds):
                for k, estimate in score.pass_at.items():
                    _add(metrics, f"final/{suite.suite}/{part.language}/{score.family}/pass@{k}", estimate)
    if report.speech is not None:
        for language in report.speech.languages:
            for contender in (*language.contenders, *language.over_seeds):
                rate = contender.rate(language.metric)
                _add(metrics, f"final/{language.task}/{contender.family}/wer", rate)
    for preferences in report.preferences:
        for text in figures_of(preferences):
            for contestant, figure, _ in values_of(preferences, text):
                key = f"final/{preferences.task}/{contestant.family}/{METRIC_NAMES[text.figure]}"
                _add(metrics, key, figure)
    for result_of_figure in report.figures:
        for scored, _ in rows_of(result_of_figure):
            name = f"{scored.family}/{key_of(result_of_figure.figure)}"
            _add(metrics, f"final/{result_of_figure.task}/{name}", scored.value)
    return {key: value for key, value in metrics.items() if value is not None}


def _add(metrics: dict[str, float | None], key: str, value: Interval) -> None:
    metrics[key] = value.value
    if value.deviation is not None:
        metrics[f"{key}_deviation"] = value.deviation
