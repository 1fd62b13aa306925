"""Figures of answers to held-out prompts, and of the held-out loss, as far as tasks name them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType

import numpy as np

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import Problem, UserError
from flora_train.config.metric_names import OF_LOSS, SACREBLEU, is_function
from flora_train.config.schema import RunConfig
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.evaluation.answers.generate import adapter_name
from flora_train.evaluation.answers.journal import Key, LoggedAnswer
from flora_train.evaluation.answers.prompts import AnsweredTask, contenders_of
from flora_train.evaluation.figures.heldout_labels import heldout_label_figures
from flora_train.evaluation.figures.intervals import (
    ContenderNames,
    Contenders,
    FigureComparison,
    resampled_figures,
)
from flora_train.evaluation.figures.overlap import exact_match_statistic, rouge_l_statistic
from flora_train.evaluation.figures.own_metric import (
    import_own_metric,
    load_own_metric,
    lower_is_better,
    own_statistic,
)
from flora_train.evaluation.figures.result_types import ConfusionMatrix, FigureResult
from flora_train.evaluation.figures.sacrebleu_scores import bleu_statistic, chrf_statistic
from flora_train.evaluation.figures.statistic import Matrix, Statistic, Vector
from flora_train.evaluation.figures.texts import FIGURES
from flora_train.evaluation.seeds import seed_groups
from flora_train.training.heldout import HeldOut

STATISTICS: dict[str, Callable[[Sequence[str], Sequence[str]], Statistic]] = {
    "exact_match": exact_match_statistic,
    "rouge_l": rouge_l_statistic,
    "chrf": chrf_statistic,
    "bleu": bleu_statistic,
}
"""Metric -> what computes it from answers and completions."""
LARGEST_LOSS = 230.0
"""Nats per token whose perplexity, 1e100, is the largest that is shown."""

logger = logging.getLogger(__name__)


@dataclass
class AnswerFigures:
    """The figures of all tasks, and what is to be said of them."""

    results: list[FigureResult] = field(default_factory=list)
    confusions: list[ConfusionMatrix] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences on what could not be measured."""


def check_metrics(config: RunConfig) -> None:
    """Raises one UserError with the metrics that cannot be computed here: for want of a package, or as a
    function of the user cannot be imported, raises, or returns no number."""
    problems: list[Problem] = []
    for name in learnt_tasks(config):
        for metric in config.tasks[name].metrics:
            key = f"tasks.{name}.metrics"
            if metric in SACREBLEU and find_spec("sacrebleu") is None:
                hint = "sacrebleu is not installed: pip install 'flora-train[text-metrics]', or remove it"
                problems.append(Problem(key, metric, hint))
            elif is_function(metric) and metric not in config.tasks[name].label_metrics:
                problems += _problems_of(partial(load_own_metric, metric, key))
        for own_key, metric in config.tasks[name].label_functions:  # see check_label_metrics
            problems += _problems_of(partial(import_own_metric, metric, f"tasks.{name}.{own_key}"))
    if problems:
        raise UserError(*problems)


def _problems_of(load: Callable[[], object]) -> Sequence[Problem]:
    try:
        load()
    except UserError as error:
        return error.problems
    return ()


def learnt_tasks(config: RunConfig) -> list[str]:
    """The tasks that some adapter learns."""
    learnt: dict[str, None] = {}
    for adapter in config.adapters.values():
        learnt |= dict.fromkeys(adapter.tasks or config.tasks)
    return [name for name in config.tasks if name in learnt]


def answer_figures(
    config: RunConfig,
    bank: AdapterBank,
    heldout: Mapping[str, HeldOut],
    tasks: Sequence[AnsweredTask],
    answers: Mapping[Key, LoggedAnswer],
    *,
    loaded: Mapping[str, Task] = MappingProxyType({}),
) -> AnswerFigures:
    """The figures that tasks name, in the order in which they name them, and those of labels.

    heldout: task -> held-out losses; answers: the content of the journal; loaded: tasks with their examples.
    """
    figures = AnswerFigures()
    answered = {task.name: task for task in tasks}
    for name, losses in heldout.items():
        if losses.labels is not None and name in loaded:
            of_labels = heldout_label_figures(config, bank, loaded[name], losses.labels)
            figures.results += of_labels.figures
            figures.confusions += of_labels.confusions
            figures.notes += of_labels.notes
            continue
        for metric in config.tasks[name].metrics:
            if metric in OF_LOSS:
                figures.results.append(_perplexity(config, bank, losses))
        if name in answered:
            _add_task(figures, config, bank, answered[name], answers)
    return figures


def _perplexity(config: RunConfig, bank: AdapterBank, heldout: HeldOut) -> FigureResult:
    """Perplexity per token, whose unit of resampling is an example."""
    options, examples = config.evaluation, len(heldout.label_tokens)

    def statistic_of(nats: Vector) -> Statistic:
        def statistic(weights: Matrix) -> dict[str, Vector]:
            loss = weights @ nats / (weights @ heldout.label_tokens)
            return {"perplexity": np.exp(np.where(loss > LARGEST_LOSS, np.nan, loss))}

        return statistic

    figures = resampled_figures(
        {contender: statistic_of(nats) for contender, nats in heldout.nats.items()},
        examples,
        samples=options.bootstrap_samples,
        seed=seed_of(config.seed, heldout.task),
    )
    comparison = FigureComparison(
        heldout.task, figures, _contenders(bank), examples=examples, confidence=options.confidence
    )
    return comparison.result("perplexity", lower_is_better=True)


def _add_task(
    figures: AnswerFigures,
    config: RunConfig,
    bank: AdapterBank,
    task: AnsweredTask,
    answers: Mapping[Key, LoggedAnswer],
) -> None:
    options = config.evaluation
    references = [prompt.reference for prompt in task.prompts]
    predictions = {}
    for contender in contenders_of(bank.specs, task.name):
        name = adapter_name(bank, contender)
        predictions[contender] = [answers[name, task.name, prompt.example].answer for prompt in task.prompts]
    if len(references) < task.examples:
        figures.notes.append(
            f"Answers to all held-out prompts of {task.name}: {len(references)} of {task.examples} examples "
            "were answered; of the others the prompt is empty, the completion is cut, or "
            "max_metric_examples leaves them out."
        )
    for metric in task.metrics:
        if metric in OF_LOSS:
            continue
        try:
            statistics, lower = _statistics(metric, f"tasks.{task.name}.metrics", predictions, references)
        except (ValueError, UserError) as error:
            figures.notes.append(f"{metric} of the answers to prompts of {task.name}: it {error}.")
            logger.warning("tasks.%s.metrics = %s: %s", task.name, metric, error)
            continue
        resampled = resampled_figures(
            statistics,
            len(references),
            samples=options.bootstrap_samples,
            seed=seed_of(config.seed, task.name),
        )
        comparison = FigureComparison(
            task.name,
            resampled,
            _contenders(bank),
            examples=len(references),
            confidence=options.confidence,
            setting=task.setting,
        )
        figures.results.append(comparison.result(metric, lower))


def _statistics(
    metric: str, key: str, predictions: Mapping[int, Sequence[str]], references: Sequence[str]
) -> tuple[dict[int, Statistic], bool]:
    """The statistic of each contender, and whether lower values are better. Raises ValueError or UserError
    for a function of the user's own that fails."""
    if not is_function(metric):
        make = STATISTICS[metric]
        statistics = {i: make(answers, references) for i, answers in predictions.items()}
        return statistics, FIGURES[metric].lower_is_better
    function = load_own_metric(metric, key)
    own = {i: own_statistic(function, metric, answers, references) for i, answers in predictions.items()}
    return own, lower_is_better(function)


def _contenders(bank: AdapterBank) -> Contenders:
    names = {BASE_ID: ContenderNames("base", "base")}
    names |= {i: ContenderNames(spec.name, spec.family) for i, spec in enumerate(bank.specs)}
    return Contenders(names, seed_groups(bank.specs))
