"""The figures of tasks with a verbalizer, from the scores of the words of their labels."""

from __future__ import annotations

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.schema import RunConfig
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.evaluation.figures.intervals import ContenderNames, Contenders, Resampling
from flora_train.evaluation.figures.labels import LabelFigures, label_figures
from flora_train.evaluation.figures.predictions import LabelPredictions
from flora_train.evaluation.seeds import seed_groups
from flora_train.training.choice_scores import ChoiceScores


def choice_figures(config: RunConfig, bank: AdapterBank, task: Task, scores: ChoiceScores) -> LabelFigures:
    """The figures of base and adapters, beside those of the majority label."""
    predictions = {}
    for contender in scores.log_probabilities:
        probabilities = scores.probabilities(contender)
        predictions[contender] = LabelPredictions(scores.predictions(contender), probabilities)
    names = {BASE_ID: ContenderNames("base", "base")}
    names |= {i: ContenderNames(spec.name, spec.family) for i, spec in enumerate(bank.specs)}
    options = config.evaluation
    training = None
    if isinstance(task.train, ChoiceSplit):
        training = task.train.references
    return label_figures(
        task.name,
        scores.spec,
        predictions,
        scores.references,
        contenders=Contenders(names, seed_groups(bank.specs)),
        resampling=Resampling(options.bootstrap_samples, options.confidence, seed_of(config.seed, task.name)),
        training=training,
        metrics=config.tasks[task.name].label_metrics,
    )
