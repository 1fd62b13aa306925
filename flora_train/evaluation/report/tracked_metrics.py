"""The final metrics of a run, as experiment trackers log them."""

from __future__ import annotations

from flora_train.evaluation.report.preference_figures import METRIC_NAMES, figures_of, values_of
from flora_train.evaluation.report.types import Report


def final_metrics(report: Report) -> dict[str, float]:
    """`final/<task>/<method>/<metric>` -> value, of base and adapters: bits_per_byte, pass@k, wer,
    and reward_accuracy and others of preferences."""
    metrics: dict[str, float | None] = {}
    for result in report.results:
        for row in (result.base, *result.contenders):
            metrics[f"final/{result.task}/{row.family}/bits_per_byte"] = row.bits_per_byte.value
    for suite in report.code:
        for part in suite.languages:
            for score in part.contenders:
                for k, estimate in score.pass_at.items():
                    key = f"final/{suite.suite}/{part.language}/{score.family}/pass@{k}"
                    metrics[key] = estimate.value
    if report.speech is not None:
        for language in report.speech.languages:
            for contender in language.contenders:
                metrics[f"final/{language.task}/{contender.family}/wer"] = contender.rate(
                    language.metric
                ).value
    for preferences in report.preferences:
        for text in figures_of(preferences):
            for contestant, figure, _ in values_of(preferences, text):
                key = f"final/{preferences.task}/{contestant.family}/{METRIC_NAMES[text.figure]}"
                metrics[key] = figure.value
    return {key: value for key, value in metrics.items() if value is not None}
