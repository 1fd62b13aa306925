"""The sentences at the top of the page of a federated run."""

from __future__ import annotations

from collections.abc import Sequence

from flora_train.evaluation.report.figure_tables import figure_estimate
from flora_train.evaluation.report.formatting import listed, number, plural
from flora_train.federated.report_tables import (
    conclusions,
    failed_rounds,
    figure_text,
    mebibytes,
    missing_updates,
    ranked,
    sent_by,
)
from flora_train.federated.result_types import FederatedReport, StrategyResult

FULL = "full"
"""Method of full fine-tuning."""


def summarise(report: FederatedReport) -> list[str]:
    """What a reader should know first, in plain English.

    Args:
        report: Of a finished run.

    Returns:
        Sentences: the best strategy, the comparison with full fine-tuning if there is one, the bytes, and
        what went wrong.
    """
    sentences = [_cheapest(report), _failures(report)]
    if report.figures:
        sentences = [_best(report), _against_full(report), *sentences]
    return [sentence for sentence in sentences if sentence]


def _best(report: FederatedReport) -> str:
    """The best strategy with rounds; without any, the best one."""
    name = report.figures[0]
    text = figure_text(name)
    with_rounds = [strategy for strategy in report.strategies if not strategy.central]
    order = ranked(report, with_rounds) or ranked(report, report.strategies)
    if not order:
        return f"No strategy has a finite figure of {text.name}."
    best = order[0]
    value = figure_estimate(best.figures[name], text)
    if text.in_percent:
        value += " percent"
    if len(order) == 1:
        return f"The global adapter of {best.name} has {value} {text.name} on held-out examples."
    lowest = "lowest" if report.lower_is_better else "highest"
    sentence = f"{best.name} has the {lowest} {text.name} of {len(order)} strategies: {value}"
    second = order[1]
    clear = conclusions(report).get((best.name, second.name)) == "better"
    verdict = "is clear" if clear else "is not clear"
    return f"{sentence}; its lead over {second.name} {verdict}."


def _against_full(report: FederatedReport) -> str:
    """How the other strategies compare with full fine-tuning, if it was run."""
    full = _full_finetuning(report)
    others = [own.name for own in report.strategies if own.method != FULL and not own.central]
    if full is None or not others:
        return ""
    said = conclusions(report)
    groups: dict[str, list[str]] = {"better": [], "worse": [], "unclear": [], "not finite": []}
    for name in others:
        groups[said.get((name, full.name), "not finite")].append(name)
    parts = []
    for verdict, names in groups.items():
        if names:
            parts.append(_compared(names, verdict))
    where = "on the examples of all clients" if full.central else "in rounds"
    return f"Against full fine-tuning {where} ({full.name}), {listed(parts)}."


def _full_finetuning(report: FederatedReport) -> StrategyResult | None:
    """The strategy of full fine-tuning that others are compared with: one with rounds, if there is one."""
    found = [strategy for strategy in report.strategies if strategy.method == FULL]
    return min(found, key=lambda strategy: strategy.central, default=None)


def _compared(names: Sequence[str], verdict: str) -> str:
    verb = "is" if len(names) == 1 else "are"
    words = {
        "better": "clearly better",
        "worse": "clearly worse",
        "unclear": "not clearly different",
        "not finite": "not comparable",
    }
    return f"{listed(names, 8)} {verb} {words[verdict]}"


def _cheapest(report: FederatedReport) -> str:
    """The strategy that sends the fewest bytes."""
    sent = {own.name: sum(sent_by(own)) for own in report.strategies if not own.central}
    if not sent:
        return ""
    fewest, most = min(sent.values()), max(sent.values())
    sizes = f"{mebibytes(fewest)} MiB in all rounds"
    cheapest = [name for name, size in sent.items() if size == fewest]
    if len(cheapest) == len(sent):
        return f"Clients and server send {sizes}."
    verb = "sends" if len(cheapest) == 1 else "send"
    dearest = listed([name for name, size in sent.items() if size == most], 3)
    sentence = f"{listed(cheapest, 3)} {verb} the fewest bytes, {sizes}"
    if fewest:
        sentence += f", and {dearest} the most, {number(most / fewest, 1)} times as many"
    return f"{sentence}."


def _failures(report: FederatedReport) -> str:
    """What went wrong, if anything did."""
    failed = sum(map(failed_rounds, report.strategies))
    missing = sum(map(missing_updates, report.strategies))
    parts = []
    if failed:
        parts.append(f"{plural(failed, 'round')} changed nothing, for lack of usable updates")
    if missing:
        verb = "is" if missing == 1 else "are"
        parts.append(f"{plural(missing, 'update')} of clients {verb} part of no average")
    if not parts:
        return ""
    runs = sum(len(strategy.seeds) for strategy in report.strategies)
    where = "Over all runs together" if runs > 1 else "In this run"
    return f"{where}, {', and '.join(parts)}."
