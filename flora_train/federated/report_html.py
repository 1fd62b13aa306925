"""The text of the page of a federated run."""

from __future__ import annotations

from markupsafe import Markup

from flora_train.evaluation.figures.texts import FigureText
from flora_train.evaluation.report.figure_tables import figure_estimate
from flora_train.evaluation.report.formatting import (
    count,
    listed,
    number,
    percent,
    plural,
    share,
)
from flora_train.evaluation.report.page import render_page, visible
from flora_train.evaluation.report.plots import legend_key
from flora_train.evaluation.report.svg import FamilyStyle, family_styles
from flora_train.federated.report_plots import rounds_plot, sent_plot
from flora_train.federated.report_summary import FULL, summarise
from flora_train.federated.report_tables import (
    client_rows,
    conclusion,
    distributions,
    failed_rounds,
    figure_text,
    incident_rows,
    mebibytes,
    missing_updates,
    population_facts,
    ranked,
    round_maps,
    seconds_of,
    sent_by,
)
from flora_train.federated.result_types import FederatedReport, StrategyResult
from flora_train.runtime.progress import duration

MANY_CLIENTS = 20
"""From more clients on, their table is folded and the page has a search field."""
MOST_INCIDENTS = 1000
"""The page shows that many; the file has all."""
METHODS = {"flora": "fLoRA", "lora": "LoRA", "ia3": "IA3", "full": "full fine-tuning", "head": "head"}


def render_federated(report: FederatedReport) -> str:
    """The page of a federated run, as text.

    Args:
        report: The results.

    Returns:
        HTML that loads nothing.
    """
    styles = family_styles([strategy.name for strategy in report.strategies])
    keys = {name: legend_key(f"key-{i}", style) for i, (name, style) in enumerate(styles.items())}
    leaders: list[StrategyResult] = []
    text = None
    if report.figures:
        leaders = ranked(report, [own for own in report.strategies if not own.central])
        text = figure_text(report.figures[0])
    incidents = list(incident_rows(report))
    content = {
        "report": report,
        "summary": summarise(report),
        "population": population_facts(report),
        "text": text,
        "texts": [figure_text(name) for name in report.figures],
        "keys": keys,
        "best": leaders[0].name if leaders else "",
        "rounds_plot": rounds_plot("by-round", report, styles) if report.figures else None,
        "sent_plot": _sent_plot(report, styles),
        "has_sparse": _has_sparse(report),
        "conclusions": [conclusion(report, difference) for difference in report.differences],
        "distributions": distributions(report),
        "clients": client_rows(report),
        "maps": round_maps(report),
        "incidents": incidents[:MOST_INCIDENTS],
        "more_incidents": len(incidents[MOST_INCIDENTS:]),
        "failures": sum(map(failed_rounds, report.strategies)),
        "facts": _facts(report),
        "confidence": percent(report.confidence),
        "many_clients": MANY_CLIENTS,
        "searched": "Find a client",
    }
    of_figures = (figure_estimate, value_text, count, listed, plural, visible)
    of_strategies = (algorithm_text, method_text, sent_by, seconds_of, failed_rounds, missing_updates)
    filters = (*of_figures, *of_strategies, mebibytes, time_text)
    return render_page("federated.html.j2", filters, package="flora_train.federated", **content)


def _sent_plot(report: FederatedReport, styles: dict[str, FamilyStyle]) -> Markup | None:
    """None where no strategy sends anything."""
    if not report.figures or all(strategy.central for strategy in report.strategies):
        return None
    return sent_plot("by-bytes", report, styles)


def _has_sparse(report: FederatedReport) -> bool:
    """Whether a strategy has a first stage of sparse values."""
    rounds = (own for strategy in report.strategies for seed in strategy.seeds for own in seed.rounds)
    return any(own.stage == "sparse" for own in rounds)


def _facts(report: FederatedReport) -> dict[str, str]:
    """Model, machine and versions, label -> text."""
    versions = ", ".join(f"{name} {version}" for name, version in report.packages.items())
    facts = {
        "Model": f"{report.model} in {report.dtype}",
        "Machine": report.machine,
        "Versions": versions,
        "Finished": report.created,
    }
    return {label: text for label, text in facts.items() if text}


def method_text(strategy: StrategyResult) -> str:
    """The method that clients train."""
    return METHODS.get(strategy.method, strategy.method)


def algorithm_text(strategy: StrategyResult) -> str:
    """How the clients' adapters become one."""
    if strategy.central:
        return "none, all examples at once"
    sparse = sum(own.stage == "sparse" for own in strategy.seeds[0].rounds)
    if sparse:
        return f"{strategy.algorithm}, {plural(sparse, 'sparse round')} first"
    if strategy.algorithm == FULL:
        return "mean of all weights"
    return strategy.algorithm


def time_text(seconds: float) -> str:
    """A time, with a decimal where it is short."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    return duration(seconds)


def value_text(value: float, text: FigureText) -> str:
    """A figure without interval."""
    if text.in_percent:
        return share(value)
    return number(value, text.digits)
