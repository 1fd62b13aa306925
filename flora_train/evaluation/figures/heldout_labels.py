"""The figures of label tasks, from the outputs of heads for held-out texts."""

from __future__ import annotations

from flora_train.adapters.bank import AdapterBank
from flora_train.config.schema import RunConfig
from flora_train.data.labels.split import LabelSplit
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.evaluation.figures.intervals import ContenderNames, Contenders, Resampling
from flora_train.evaluation.figures.labels import LabelFigures, label_figures
from flora_train.evaluation.figures.predictions import LabelPredictions
from flora_train.evaluation.seeds import seed_groups
from flora_train.training.label_heldout import HeldOutLabels


def heldout_label_figures(
    config: RunConfig, bank: AdapterBank, task: Task, labels: HeldOutLabels
) -> LabelFigures:
    """The figures of a task's adapters beside those of the majority label. There is no base among them, which
    has no head."""
    predictions = {}
    for adapter in labels.outputs:
        predictions[adapter] = LabelPredictions(labels.predicted(adapter), labels.scores(adapter))
    training = None
    if isinstance(task.train, LabelSplit):
        training = [task.train.target(i) for i in range(len(task.train))]
    names = {i: ContenderNames(spec.name, spec.family) for i, spec in enumerate(bank.specs)}
    options = config.evaluation
    return label_figures(
        task.name,
        labels.spec,
        predictions,
        labels.targets,
        contenders=Contenders(names, seed_groups(bank.specs)),
        resampling=Resampling(options.bootstrap_samples, options.confidence, seed_of(config.seed, task.name)),
        training=training,
        metrics=config.tasks[task.name].label_metrics,
    )
