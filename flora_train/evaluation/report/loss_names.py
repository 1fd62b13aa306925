"""The name of the loss of each task, for the panels of its curves."""

from __future__ import annotations

from flora_train.evaluation.report.types import Report

TEXT_LOSS = "nats per token"
LOSSES = {
    "accuracy": "cross-entropy",
    "token_accuracy": "cross-entropy per token with a label",
    "subset_accuracy": "binary cross-entropy",
    "mse": "squared error",
    "contrastive_loss": "contrastive loss",
}
"""Figure that only one type of task has -> the loss of the task."""
LABEL_FIGURES = tuple(figure for figure in LOSSES if figure != "contrastive_loss")


def loss_names(report: Report) -> dict[str, str]:
    """Task that adapters learn -> its loss, in words. The text of a verbalizer is a loss per token."""
    names = dict.fromkeys((adapter.task for adapter in report.adapters), "loss of the objective")
    for figure in report.figures:
        if figure.figure in LOSSES:
            names[figure.task] = LOSSES[figure.figure]
    for result in report.results:
        names[result.task] = TEXT_LOSS
        if result.objective != "sft":
            names[result.task] = f"{result.objective.upper()} loss"
    return names


def tasks_of_labels(report: Report) -> list[str]:
    """Tasks of labelled texts, with a head or a verbalizer."""
    return list(dict.fromkeys(figure.task for figure in report.figures if figure.figure in LABEL_FIGURES))


def tasks_of_heads(report: Report) -> list[str]:
    """Tasks of labelled texts whose adapters have heads."""
    texts = {result.task for result in report.results}
    return [task for task in tasks_of_labels(report) if task not in texts]
