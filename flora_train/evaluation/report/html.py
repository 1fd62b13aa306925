"""The page of a run and the page that compares runs: self-contained HTML, readable without its script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from flora_train.evaluation.code.programs.execute import STATUSES
from flora_train.evaluation.code.score_types import CodeSuite, LanguageScores, MacroScores
from flora_train.evaluation.report import curves, plots
from flora_train.evaluation.report.comparison import (
    costs,
    measures,
    seed_groups,
    settings,
    verdicts,
    with_seeds,
)
from flora_train.evaluation.report.expert_maps import load_maps
from flora_train.evaluation.report.figure_tables import (
    constant_baselines,
    figure_estimate,
    figure_tables,
    figure_value,
    figure_verdict,
    has_undefined,
    is_shown_whole,
    score_of,
)
from flora_train.evaluation.report.formatting import (
    count,
    estimate,
    listed,
    mean_number,
    mean_share,
    number,
    percent,
    share,
    share_estimate,
    shared_digits,
    stage_duration,
    verdict,
)
from flora_train.evaluation.report.heatmap import heatmaps
from flora_train.evaluation.report.joined_report import note_on_joined_families, with_joined_families
from flora_train.evaluation.report.joined_seeds import note_on_seeds, with_joined_seeds
from flora_train.evaluation.report.loss_names import loss_names, tasks_of_heads, tasks_of_labels
from flora_train.evaluation.report.page import render_page, visible
from flora_train.evaluation.report.preference_figures import LABELLED, PAIRED, examples_of, setting_of
from flora_train.evaluation.report.published_rows import ComparedTable
from flora_train.evaluation.report.published_tables import (
    measured_as,
    method_label,
    published_digits,
    published_percent,
)
from flora_train.evaluation.report.seed_tables import seed_tables
from flora_train.evaluation.report.summary_text import summarise
from flora_train.evaluation.report.svg import FamilyStyle, family_styles
from flora_train.evaluation.report.sweep_panel import sweep_panel
from flora_train.evaluation.report.sweeps import heading, sweep_plots, winner_is_clear
from flora_train.evaluation.report.types import JointSpeedup, Report, RunFacts, SplitSummary
from flora_train.evaluation.speech.score_types import Rate, SpeechLanguage, SpeechResults
from flora_train.training.step_timer import format_shares

MAX_DRAWN = 100
"""Tasks that have plots. The tables show all tasks; the page says which have no plots."""
MANY_TASKS = 8
"""From more tasks on, the page has a search field."""
FEW_EXAMPLES = 30
"""With fewer held-out examples, bootstrap intervals tend to be too narrow, and the page says so."""
LEAST_SHARE = 1e-9
"""Tasks with a smaller target share are not drawn in the plot of shares."""

LEFT_OUT = {
    "unsampled": "were left out by the limit on examples",
    "empty": "had no text to learn",
    "over_long_dropped": "were dropped as too long",
    "prompt_too_long": "were left out because what precedes the learnt text fills the length limit",
    "over_long_truncated": "were cut off at the length limit",
    "over_long_split": "were split into several examples",
}
"""Field of a split's counts -> what it means for the rows."""


@dataclass(frozen=True)
class SweepPanels:
    """The plots of one swept key."""

    heading: str
    legend: Sequence[tuple[str, Markup]]
    """Label of a series, and its line and marker."""
    panels: Sequence[tuple[str, Markup]]
    """Task and panel."""
    left_out: str
    """Says that further tasks have no plot; empty if all have one."""


def render_html(report: Report, published: Sequence[ComparedTable] = ()) -> str:
    """The page of a run, as text. published: tables beside the run's figures."""
    notes = [note_on_seeds(report)]
    tables_of_seeds = seed_tables(report)
    report = with_joined_seeds(report)
    notes.append(note_on_joined_families(report))
    report = with_joined_families(report)
    styles = family_styles(report.families)
    limits = plots.difference_range(report.results)
    drawn = report.results[:MAX_DRAWN]
    curve_axes = loss_names(report)
    difference_panels = [
        plots.difference_panel(f"difference-{i}", result, styles, limits) for i, result in enumerate(drawn)
    ]
    curve_panels = []
    for i, task in enumerate(list(curve_axes)[:MAX_DRAWN]):
        adapters = [adapter for adapter in report.adapters if adapter.task == task]
        curve_panels.append(curves.curve_panel(f"curve-{i}", task, adapters, report.curves, styles))
    summary = summarise(report)
    summary += [note for note in notes if note is not None]
    return _page(
        "report.html.j2",
        report=report,
        published=published,
        keys={
            family: plots.legend_key(f"key-{i}", style) for i, (family, style) in enumerate(styles.items())
        },
        summary=summary,
        seeds_note=notes[0],
        seed_tables=tables_of_seeds,
        digits=shared_digits(report.results),
        confidence=percent(report.confidence or 0.0),
        curve_axes=list(curve_axes.items()),
        tested=_tested(report),
        without_base=tasks_of_heads(report),
        difference_panels=difference_panels,
        curve_panels=curve_panels,
        pass_panels=[_pass_panels(i, suite, styles) for i, suite in enumerate(report.code)],
        pass_tables=[_pass_table(suite) for suite in report.code],
        **_speech_columns(report.speech),
        preference_families=_preference_families(report),
        figure_tables=figure_tables(report.figures),
        constant_baselines=constant_baselines(report.figures),
        undefined_figures=has_undefined(report.figures),
        paired_figures=PAIRED,
        labelled_figures=LABELLED,
        sweep_panels=_sweep_panels(report),
        winner_is_clear=partial(winner_is_clear, report=report),
        heatmaps=heatmaps(report),
        load_maps=load_maps(report.experts),
        many_tasks=MANY_TASKS,
        statuses=STATUSES,
        left_out={
            "train": left_out([task.train for task in report.tasks]),
            "validation": left_out([task.validation for task in report.tasks]),
        },
        tokens_drawn=sum(task.tokens_drawn for task in report.tasks),
        fairness=_fairness(report),
        cost=_cost(report),
        few_examples=FEW_EXAMPLES,
        max_points=curves.MAX_POINTS,
    )


def _tested(report: Report) -> list[str]:
    """Tasks whose figures are those of test rows."""
    tested = {task.name for task in report.tasks if task.test is not None}
    return [task for task in tasks_of_labels(report) if task in tested]


def render_comparison(reports: Mapping[str, Report]) -> str:
    """The page of several runs, as text. reports: label of a run -> its report."""
    reports = {label: with_joined_seeds(report) for label, report in reports.items()}
    runs = list(reports.values())
    compared, groups, names = measures(runs), seed_groups(runs), with_seeds(list(reports), runs)
    return _page(
        "comparison.html.j2",
        names=names,
        seed_groups=[" and ".join(names[i] for i in group) for group in groups if len(group) > 1],
        measures=compared,
        summary=verdicts(names, compared, groups),
        settings=settings(runs),
        costs=costs(runs),
        many=max((len(measure.rows) for measure in compared), default=0) > MANY_TASKS,
    )


def _page(template: str, **content: Any) -> str:
    filters = (
        number, mean_number, estimate, count, listed, percent, share, mean_share, share_estimate,
        stage_duration, verdict,
    )  # fmt: skip
    of_published = (measured_as, method_label, published_digits, published_percent)
    of_preferences = (examples_of, setting_of)
    of_figures = (figure_estimate, figure_value, figure_verdict, is_shown_whole, score_of)
    functions = (*filters, *of_published, *of_preferences, *of_figures, visible)
    return render_page(template, functions, **content)


def _pass_panels(
    number_of_suite: int, suite: CodeSuite, styles: Mapping[str, FamilyStyle]
) -> list[tuple[str, Markup]]:
    """(language, panel) of the mean, where there are several languages, and of the first languages."""
    parts: list[tuple[str, LanguageScores | MacroScores]] = [
        (part.name, part) for part in suite.languages[:MAX_DRAWN]
    ]
    if len(suite.macro.languages) > 1:
        parts.insert(0, ("mean of languages", suite.macro))
    k, top = suite.pass_at_k[0], 0.0
    for _, part in parts:
        top = max([top, *(contender.pass_at[k].high or 0.0 for contender in part.contenders)])
    panels = []
    for j, (name, part) in enumerate(parts):
        panel = plots.pass_panel(f"pass-{number_of_suite}-{j}", name, part, k, styles=styles, top=top or 1.0)
        panels.append((name, panel))
    return panels


def _sweep_panels(report: Report) -> list[SweepPanels]:
    """The plots of every swept key."""
    panels = []
    for i, (key, drawn) in enumerate(sweep_plots(report).items()):
        labels = list(dict.fromkeys(series.label for plot in drawn for series in plot.series))
        styles = family_styles(labels)
        legend = [
            (label, plots.legend_key(f"sweep-{i}-key-{j}", style))
            for j, (label, style) in enumerate(styles.items())
        ]
        panels_of_key = []
        for j, plot in enumerate(drawn[:MAX_DRAWN]):
            panels_of_key.append((plot.task, sweep_panel(f"sweep-{i}-{j}", plot, heading(key), styles)))
        left_out = ""
        if len(drawn) > MAX_DRAWN:
            left_out = f"Plots of the first {MAX_DRAWN} of {len(drawn)} tasks; the table shows all tasks."
        panels.append(SweepPanels(heading(key), legend, panels_of_key, left_out))
    return panels


def _pass_table(
    suite: CodeSuite,
) -> tuple[list[LanguageScores | MacroScores], list[str], list[str], list[str]]:
    """Parts of the table of pass@k, which ends with the mean over languages, and name, problems and samples
    of each."""
    parts: list[LanguageScores | MacroScores] = []
    names, problems, samples = [], [], []
    for part in suite.languages:
        parts.append(part)
        names.append(part.name)
        evaluated = count(part.problems)
        if part.problems < part.available:
            evaluated += f" of {count(part.available)}"
        problems.append(evaluated)
        samples.append(count(min(contender.samples for contender in part.contenders)))
    if len(suite.macro.languages) > 1:
        parts.append(suite.macro)
        names.append(f"mean of {len(suite.macro.languages)}")
        problems.append("")
        samples.append("")
    return parts, names, problems, samples


def _speech_columns(speech: SpeechResults | None) -> dict[str, dict[Rate, list[str]]]:
    """Units of the reference and the normaliser of each task, for each error rate."""
    units: dict[Rate, list[str]] = {"wer": [], "wer_normalized": [], "cer": []}
    normalizers: dict[Rate, list[str]] = {"wer": [], "wer_normalized": [], "cer": []}
    languages: Sequence[SpeechLanguage] = ()
    if speech is not None:
        languages = speech.languages
    for part in languages:
        for rate in units:
            units[rate].append(count(part.contenders[0].rate(rate).units))
            normalizers[rate].append("none" if rate == "wer" else part.normalizer)
    return {"speech_units": units, "normalizers": normalizers}


def _preference_families(report: Report) -> list[str]:
    """Families that take part in a preference task, the base first."""
    families: dict[str, None] = {}
    for result in report.preferences:
        families |= dict.fromkeys(result.by_family)
    return list(families)


def left_out(splits: Sequence[SplitSummary]) -> list[str]:
    """Rows that were left out or changed, over all tasks, in words."""
    phrases = []
    for field, phrase in LEFT_OUT.items():
        total = sum(getattr(split, field) for split in splits)
        if total:
            phrases.append(f"{count(total)} {phrase}")
    clips: Counter[str] = Counter()
    for split in splits:
        clips.update({reason: unusable.clips for reason, unusable in split.unusable.items()})
    return phrases + [f"{count(n)} were left out: {reason}" for reason, n in clips.items()]


def _fairness(report: Report) -> Markup | None:
    """Shares over time, where there are several tasks and more than one step was logged."""
    targets = {task.name: task.target_share for task in report.tasks if task.target_share > LEAST_SHARE}
    drawn = {task: points for task, points in report.curves.drawn.items() if task in targets}
    if len(drawn) < 2 or len(next(iter(drawn.values()))) < 2:
        return None
    return curves.fairness_panel("fairness", drawn, targets)


def joint_speedup_text(speedup: JointSpeedup | None) -> str:
    """The time of the last step's batches in joint training and as separate runs."""
    if speedup is None:
        return "not measured"
    ratio = number(speedup.separate_seconds / speedup.joint_seconds, 2)
    joint, separate = number(speedup.joint_seconds, 1), number(speedup.separate_seconds, 1)
    remark = ""
    if speedup.measured is not None and speedup.measured < speedup.adapters:
        remark = f", estimated from {speedup.measured} of {speedup.adapters} adapters"
    return (
        f"{ratio} times as long, with the base loaded {speedup.adapters} times: "
        "forward and backward of the last step's "
        f"rows took {joint} s jointly and {separate} s adapter by adapter (a single measurement{remark})"
    )


def _cost(report: Report) -> dict[str, str]:
    """Speed, memory, machine and versions, label to text. What was not recorded is left out."""
    facts = report.facts
    tokens, seconds = sum(adapter.tokens for adapter in report.adapters), facts.seconds.get("train")
    rate = memory = step = ""
    if seconds and tokens:
        rate = f"{number(tokens / seconds, 0)} during training, {count(tokens)} tokens in total"
    if facts.peak_memory_bytes:
        memory = f"{facts.peak_memory_bytes / 2**30:.1f} GiB in the main process"
    if facts.time_shares:
        step = f"{format_shares(facts.time_shares)} (base: forward and backward of the frozen model alone)"
    rows = {
        "Adapter tokens per second": rate,
        "As separate runs": joint_speedup_text(facts.joint_speedup),
        "Time of a step": step,
        "Peak memory": memory,
        "Processes": facts.processes,
        "Device": facts.device,
        "Finished": facts.finished,
        "GPU": facts.machine.gpu or "none",
        "Processor": _processor(facts),
        "Model": " in ".join(filter(None, (facts.model, facts.dtype))),
        "Read from the hub": ", ".join(f"{name} ({sha[:12]})" for name, sha in facts.hub_commits.items()),
        "Versions": _versions(facts),
        "Commit": facts.commit or "not recorded",
        "Command": facts.command,
    }
    return {label: str(text) for label, text in rows.items() if text}


def _processor(facts: RunFacts) -> str:
    machine = facts.machine
    cores = None
    if machine.cpus is not None and machine.threads is not None:
        cores = f"{machine.cpus} CPUs, {machine.threads} threads"
    return ", ".join(filter(None, (machine.processor, cores, machine.system)))


def _versions(facts: RunFacts) -> str:
    versions = {"flora_train": facts.flora_train, "Python": facts.python, **facts.packages}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)
