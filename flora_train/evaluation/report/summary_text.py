"""The summary of a run in sentences, which say only what the intervals allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from flora_train.evaluation.code.score_types import CodeSuite, LanguageScores, MacroScores
from flora_train.evaluation.figures.result_types import FigureResult
from flora_train.evaluation.preferences.score_types import PreferenceResult
from flora_train.evaluation.report.figure_tables import against_baselines, figure_verdict
from flora_train.evaluation.report.formatting import (
    NOT_FINITE,
    count,
    interval,
    listed,
    number,
    percent,
    plural,
    share,
    shared_digits,
    verdict,
)
from flora_train.evaluation.report.preference_figures import examples_of
from flora_train.evaluation.report.types import ContenderResult, Report, TaskResult
from flora_train.evaluation.speech.score_types import SpeechResults

MAX_NAMES = 4
"""Adapters or tasks that a sentence names."""
MAX_LANGUAGES = 6


def summarise(report: Report) -> list[str]:
    """Paragraphs on held-out loss against the base, methods against each other, preferences, programs and
    speech."""
    results = [result for result in report.results if result.objective == "sft"]
    paragraphs = [_training(report)]
    if results:
        paragraphs = [
            f"{_training(report)} {_against_base(results)}{_scope(report, results)}",
            *_between_methods(results),
        ]
    if report.preferences:
        paragraphs.append(_preferences(report.preferences))
    if embeddings := [figure for figure in report.figures if figure.figure == "recall_at_1"]:
        paragraphs.append(_embeddings(embeddings))
    if baselines := " ".join(against_baselines(report.figures)):
        paragraphs.append(baselines)
    paragraphs += map(_code, report.code)
    if report.speech is not None:
        paragraphs.append(_speech(report.speech))
    return paragraphs


def _training(report: Report) -> str:
    """The sentence on what was trained."""
    tasks = list(dict.fromkeys(adapter.task for adapter in report.adapters))
    where = f"task {tasks[0]}" if len(tasks) == 1 else plural(len(tasks), "task")
    verb = "was" if len(report.adapters) == 1 else "were"
    model = report.facts.model or "one base model"
    last_steps = [points[-1][0] for points in report.curves.training.values() if points]
    steps = max(last_steps, default=0)
    length = f", in {plural(steps, 'step')}" if steps else ""
    return (
        f"{plural(len(report.adapters), 'adapter')} on {where} {verb} trained in one run on {model}{length}."
    )


def _scope(report: Report, results: Sequence[TaskResult]) -> str:
    """The sentence on the tasks that a statement on text leaves out; "" if it is about all of them."""
    tasks = {adapter.task for adapter in report.adapters}
    others = []
    if len(results) < len(report.results):
        others.append("a preference")
    if tasks - {result.task for result in report.results}:
        others.append("labels or embeddings")
    if not others:
        return ""
    names = listed([result.task for result in results], MAX_NAMES)
    return f" This is said of {names}; the other tasks learn {', '.join(others)}."


def _embeddings(results: Sequence[FigureResult]) -> str:
    """How many adapters find more positives than the base."""
    better: list[str] = []
    worse: list[str] = []
    adapters = 0
    for result in results:
        for family, difference in result.to_base.items():
            adapters += 1
            conclusion = figure_verdict(difference, result.lower_is_better)
            if conclusion in ("better", "worse"):
                names = {"better": better, "worse": worse}[conclusion]
                names.append(f"{family} on {result.task}")
    sentence = (
        f"Recall at 1 of held-out embeddings is clearly above the base's for {count(len(better))} of "
        f"{plural(adapters, 'adapter')}"
    )
    if worse:
        sentence += f", and clearly below it for {listed(worse, MAX_NAMES)}"
    return f"{sentence}."


def _code(suite: CodeSuite) -> str:
    """pass@k of a suite: the mean over languages, or the only language."""
    scores: LanguageScores | MacroScores
    if len(suite.languages) == 1:
        scores = suite.languages[0]
        where = f"in {suite.languages[0].name}"
    elif suite.macro.languages:
        scores = suite.macro
        where = f"over {len(suite.macro.languages)} languages"
    else:
        return (
            f"On the {suite.suite} problems nothing could be compared: "
            "see the list of what was not evaluated."
        )
    k = suite.pass_at_k[0]
    values: list[str] = []
    for contender in scores.contenders:
        value = f"{contender.family} {share(contender.pass_at[k].value)}\u00a0%"
        difference = scores.to_base.get(contender.family)
        if difference is not None and not difference[k].excludes_zero:
            value += " (no clear difference to the base)"
        if contender.family == "base":
            values.insert(0, value)
        elif difference is not None:
            values.append(value)
    first, *others = values or ["nothing"]
    methods = f", {listed(others)}" if others else ""
    return f"pass@{k} on the {suite.suite} problems {where}: {first}{methods}."


def _preferences(results: Sequence[PreferenceResult]) -> str:
    """Reward accuracy of each adapter; of many adapters, how many are clearly above the base."""
    cases: list[str] = []
    better: list[str] = []
    for result in results:
        for family, difference in result.to_base.items():
            conclusion = verdict(difference.reward_accuracy.negated())
            value = result.by_family[family].reward_accuracy.value
            case = f"{family} on {result.task} {share(value)}\u00a0% of {examples_of(result)}"
            remarks = {"unclear": ", no clear difference to the base", "worse": ", clearly below the base"}
            cases.append(case + remarks.get(conclusion, ""))
            if conclusion == "better":
                better.append(f"{family} on {result.task}")
    if len(cases) <= MAX_NAMES:
        return f"Reward accuracy on held-out preferences: {'; '.join(cases)}."
    if not better:
        return (
            f"Of {count(len(cases))} adapters none has a reward accuracy on held-out preferences "
            "that is clearly above the base's."
        )
    return (
        f"Reward accuracy on held-out preferences is clearly above the base's for {count(len(better))} of "
        f"{count(len(cases))} adapters ({listed(better, MAX_NAMES)})."
    )


def _speech(speech: SpeechResults) -> str:
    """The languages in which each method makes significantly fewer errors than the base."""
    better: dict[str, list[str]] = {}
    for part in speech.languages:
        for family, difference in part.to_base.items():
            tasks = better.setdefault(family, [])
            if verdict(difference.rate(part.metric)) == "better":
                tasks.append(part.task)
    methods = []
    for family, tasks in better.items():
        shown = ", ".join(tasks[:MAX_LANGUAGES])
        if len(tasks) > MAX_LANGUAGES:
            shown += f" and {len(tasks) - MAX_LANGUAGES} more"
        methods.append(f"{family} in {shown or 'none'}")
    if not any(better.values()):
        return "No method has a significantly lower error rate than the base in any language."
    total = plural(len(speech.languages), "language")
    return f"Error rate is significantly lower than the base: {'; '.join(methods)} (of {total})."


def _against_base(results: Sequence[TaskResult]) -> str:
    names: dict[str, list[str]] = {"better": [], "worse": [], "unclear": [], NOT_FINITE: []}
    for result in results:
        for contender in result.contenders:
            names[verdict(contender.difference_to_base)].append(f"{contender.family} on {result.task}")
    total, better = sum(map(len, names.values())), len(names["better"])
    level = percent(results[0].confidence)
    if total == 1:
        return _one_against_base(results[0], level)
    if better == total:
        subject = f"On all {len(results)} tasks every method" if len(results) > 1 else "Every method"
        claim = "predicts held-out text better than the base model"
        return f"{subject} {claim}: no {level} interval of the difference includes zero."
    parts = [f"{better or 'none'} {_predict(better or 1)} held-out text better than the base model"]
    if worse := names["worse"]:
        parts.append(f"{len(worse)} {_predict(len(worse))} it worse ({listed(worse, MAX_NAMES)})")
    if unclear := names["unclear"]:
        reason = f"the {level} interval includes zero"
        if _single_examples(results):
            reason = "no interval can be computed from one held-out example"
        shown = listed(unclear, MAX_NAMES)
        parts.append(f"for {len(unclear)} there is no clear difference, {reason} ({shown})")
    if diverged := names[NOT_FINITE]:
        shown = listed(diverged, MAX_NAMES)
        parts.append(f"{len(diverged)} cannot be compared, the held-out loss is not finite ({shown})")
    nouns = "adapters"
    if any(row.bits_per_byte.deviation is not None for result in results for row in result.contenders):
        nouns = "adapters and means over seeds"
    return f"Of {count(total)} {nouns}, {'; '.join(parts)}."


def _predict(adapters: int) -> str:
    return "predicts" if adapters == 1 else "predict"


def _one_against_base(result: TaskResult, level: str) -> str:
    """The sentence on a run of a single adapter."""
    difference, digits = result.contenders[0].difference_to_base, shared_digits([result])
    value = number(difference.value, digits, "+")
    figures = f"{value} bits per byte, {level} interval {interval(difference, digits)}"
    predicts = "It predicts"
    if result.contenders[0].bits_per_byte.deviation is not None:
        predicts = "In the mean over their seeds they predict"
    return {
        "better": f"{predicts} held-out text better than the base model: {figures}.",
        "worse": f"{predicts} held-out text worse than the base model: {figures}.",
        "unclear": f"There is no clear difference to the base model on held-out text: {figures}.",
        NOT_FINITE: "Its held-out loss is not finite, so it cannot be compared with the base model.",
    }[verdict(difference)]


def _single_examples(results: Sequence[TaskResult]) -> bool:
    return all(result.examples == 1 for result in results)


def _between_methods(results: Sequence[TaskResult]) -> list[str]:
    """The best method of each task with several, and whether its lead is clear."""
    compared = [result for result in results if len(result.ranked) > 1]
    if not compared:
        return []
    best = {result.task: result.ranked[0] for result in compared}
    tied = [result.task for result in compared if not result.lead_is_clear]
    sentence = _best_methods(best, results)
    if tied:
        where = f" on {listed(tied, MAX_NAMES)}" if len(tied) < len(best) else " on any task"
        if len(best) == 1:
            where = ""
        reason = "the interval includes zero"
        if _single_examples(results):
            reason = "no interval can be computed from one held-out example"
        return [f"{sentence} The lead over the next method is not clear{where}: {reason}."]
    where = {1: "", 2: " on both tasks"}.get(len(best), f" on all {len(best)} tasks")
    return [f"{sentence} The lead over the next method is clear{where}."]


def _best_methods(best: Mapping[str, ContenderResult], results: Sequence[TaskResult]) -> str:
    """best: task -> its best adapter."""
    wins = Counter(contender.family for contender in best.values()).most_common()
    families = [family for family, _ in wins]
    if len(best) <= MAX_NAMES:
        cases = listed(_best_on_each_task(best, results, named=len(families) > 1))
        if len(families) > 1:
            return f"The best method is {cases}."
        everywhere = " everywhere" if len(best) > 1 else ""
        return f"The best method is {families[0]}{everywhere}: {cases}."
    if len(families) == 1:
        return f"On all {len(best)} tasks with more than one method the best is {families[0]}."
    counts = listed([f"{family} on {tasks}" for family, tasks in wins], MAX_LANGUAGES)
    return f"Of {len(best)} tasks with more than one method, the best is {counts}."


def _best_on_each_task(
    best: Mapping[str, ContenderResult], results: Sequence[TaskResult], *, named: bool
) -> list[str]:
    """`flora on lua (−0.200, −0.210 to −0.190)` for each task; the first with unit and level. named: with the
    family."""
    digits, level = shared_digits(results), percent(results[0].confidence)
    remarks = {"worse": ", still worse than the base", "unclear": ", not clearly different from the base"}
    cases: list[str] = []
    for task, contender in best.items():
        difference = contender.difference_to_base
        value, bounds = number(difference.value, digits, "+"), interval(difference, digits)
        if not cases:
            value, bounds = f"{value} bits per byte", f"{level} interval {bounds}"
        subject = f"{contender.family} on {task}" if named else task
        cases.append(f"{subject} ({value}, {bounds}{remarks.get(verdict(difference), '')})")
    return cases
