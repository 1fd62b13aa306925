"""The result of the study as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flora_train.evaluation.bootstrap import Estimate
from flora_train.evaluation.report.types import Report

from .scores import FIGURE, Score, complete_methods, mean_score
from .tasks import SIZES, StudyTask

MAIL = "mail"
MAJORITY, TFIDF = "majority", "tfidf"
TITLES = {
    MAJORITY: "majority label",
    TFIDF: "TF-IDF + logistic regression",
    "gated": "gated residual head",
    "full": "full fine-tuning",
    "head": "head alone",
    "ia3": "IA3",
    "lora": "LoRA",
    "flora": "fLoRA",
}
"""Method -> how the tables call it, in their order. Others follow by name."""
SAME = 1e-9
"""Difference of values up to which they are equal."""
Scores = Mapping[str, Mapping[str, Score]]
"""Task (with its training set) -> method -> score."""


@dataclass(frozen=True)
class Study:
    """All tasks and scores."""

    tasks: Sequence[StudyTask]
    scores: Scores
    report: Report | None = None
    """Of the run whose adapters made predictions."""

    def of_size(self, size: int, *, mail: bool) -> list[StudyTask]:
        """The chapters, or the e-mails, with this training set; the largest that there is."""
        chosen = {}
        for task in self.tasks:
            if (task.name == MAIL) == mail and task.size <= size:
                chosen[task.name] = task
        return list(chosen.values())

    def methods(self, tasks: Sequence[StudyTask]) -> list[str]:
        """The methods that have scores on all of these tasks, in the order of the tables."""
        methods = complete_methods(self.scores[task.key] for task in tasks)
        order = list(TITLES)
        return sorted(methods, key=lambda m: (order.index(m) if m in order else len(order), m))


def write_study(study: Study) -> list[str]:
    """All tables, one line after the other."""
    lines = [*_sizes(study)]
    for mail, title in ((False, "Diagnoses: mean over the chapters"), (True, "E-mails: spam or ham")):
        if study.of_size(SIZES[0], mail=mail):
            lines += ["", f"## {title}", "", *_summary(study, mail=mail)]
    for size in SIZES:
        if tasks := study.of_size(size, mail=False):
            lines += ["", f"## Chapter by chapter, {size:,} training texts", "", *_by_task(study, tasks)]
    if study.report is not None:
        lines += ["", "## The run's own report", "", *_agreement(study, study.report)]
    return lines


def _sizes(study: Study) -> Iterator[str]:
    yield "| task | labels | test texts | training texts |"
    yield "|---|---|---|---|"
    sizes: dict[str, list[str]] = {}
    for task in study.tasks:
        sizes.setdefault(task.name, []).append(f"{len(task.train.texts):,}")
    for name, numbers in sizes.items():
        task = next(task for task in study.tasks if task.name == name)
        yield f"| {name} | {len(task.labels)} | {len(task.test.texts)} | {', '.join(numbers)} |"


def _summary(study: Study, *, mail: bool) -> Iterator[str]:
    """A row for each training size and method, and sentences about what beats no baseline."""
    yield (
        "| training texts | method | macro-F1 [95 %] | deviation over seeds | against majority | "
        "against TF-IDF | tasks: clearly better / worse than TF-IDF |"
    )
    yield "|---|---|---|---|---|---|---|"
    verdicts = []
    for size in SIZES:
        tasks = study.of_size(size, mail=mail)
        methods = study.methods(tasks)
        means = {m: mean_score([study.scores[task.key][m] for task in tasks]) for m in methods}
        for method in methods:
            counts = _clear(study, tasks, method)
            yield _summary_row(size, method, means, counts)
        verdicts += list(_verdicts(size, means))
    yield ""
    yield from verdicts


def _summary_row(size: int, method: str, means: Mapping[str, Score], counts: str) -> str:
    score = means[method]
    deviation = "" if score.deviation is None else f"{score.deviation:.3f}"
    cells = [f"{size:,}", TITLES.get(method, method), _interval(score.estimate()), deviation]
    for baseline in (MAJORITY, TFIDF):
        difference = ""
        if baseline in means and method not in (baseline, MAJORITY):
            difference = _interval(score.minus(means[baseline]), signed=True)
        cells.append(difference)
    cells.append(counts)
    return f"| {' | '.join(cells)} |"


def _clear(study: Study, tasks: Sequence[StudyTask], method: str) -> str:
    """On how many tasks a method is clearly better, and clearly worse, than TF-IDF."""
    better = worse = 0
    for task in tasks:
        scores = study.scores[task.key]
        if method in (MAJORITY, TFIDF) or TFIDF not in scores:
            return ""
        difference = scores[method].minus(scores[TFIDF])
        better += difference.low > 0
        worse += difference.high < 0
    return f"{better} / {worse} of {len(tasks)}"


def _verdicts(size: int, means: Mapping[str, Score]) -> Iterator[str]:
    """Which methods do not clearly beat each baseline."""
    for baseline in (MAJORITY, TFIDF):
        if baseline not in means:
            continue
        compared = [method for method in means if method not in (MAJORITY, TFIDF)]
        if baseline == MAJORITY and TFIDF in means:
            compared.insert(0, TFIDF)
        losers = [TITLES.get(m, m) for m in compared if not means[m].minus(means[baseline]).low > 0]
        if not compared:
            continue
        sentence = "all compared methods are clearly better"
        if losers:
            sentence = f"not clearly better: {', '.join(losers)}"
        yield f"- {size:,} training texts, against {TITLES[baseline]}: {sentence}."


def _by_task(study: Study, tasks: Sequence[StudyTask]) -> Iterator[str]:
    """Macro-F1 of every chapter and method; a star marks what is not clearly better than TF-IDF."""
    methods = study.methods(tasks)
    yield f"| task | texts | {' | '.join(TITLES.get(m, m) for m in methods)} |"
    yield f"|---|---|{'---|' * len(methods)}"
    for task in tasks:
        scores = study.scores[task.key]
        cells = [task.name, f"{len(task.train.texts):,}"]
        for method in methods:
            mark = ""
            if method not in (MAJORITY, TFIDF) and TFIDF in scores:
                mark = "" if scores[method].minus(scores[TFIDF]).low > 0 else " *"
            cells.append(f"{_interval(scores[method].estimate())}{mark}")
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield "A star: not clearly better than TF-IDF (the paired interval of the difference is not above zero)."


def _agreement(study: Study, report: Report) -> Iterator[str]:
    """How close the figures of report.json are to those of the predictions."""
    differing, differences = [], []
    for figure in report.figures:
        scores = study.scores.get(figure.task, {})
        if figure.figure != FIGURE:
            continue
        for own in (*figure.over_seeds, *figure.contenders):
            score = scores.get(own.family)
            if score is None or own.value.value is None:
                continue
            differences.append(abs(score.value - own.value.value))
            if differences[-1] > SAME:
                method = TITLES.get(own.family, own.family)
                cells = (figure.task, method, f"{own.value.value:.4f}", f"{score.value:.4f}")
                differing.append(f"| {' | '.join(cells)} |")
    if not differences:
        yield "No adapter has predictions: `python studies/clinical.py adapters RUN` makes them."
        return
    yield (
        "The tables above are made from the predictions of the run's final evaluation, or with --plain-peft "
        "from those of the exported adapters in plain transformers and PEFT. "
        f"Of {len(differences)} values of macro-F1 in report.json, {len(differing)} differ from them by more "
        f"than {SAME:g}; the largest difference is {max(differences):.2g}."
    )
    if differing:
        yield ""
        yield "| task | method | report.json | from predictions |"
        yield "|---|---|---|---|"
        yield from differing


def _interval(estimate: Estimate, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
