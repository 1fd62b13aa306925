"""Figures of tasks of embeddings: the loss, recall at 1 and mean reciprocal rank of base and adapters."""

from __future__ import annotations

from collections.abc import Mapping

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.schema import RunConfig
from flora_train.data.splits import seed_of
from flora_train.evaluation.figures.intervals import (
    ContenderNames,
    Contenders,
    FigureComparison,
    resampled_figures,
)
from flora_train.evaluation.figures.result_types import FigureResult
from flora_train.evaluation.figures.statistic import combined, mean_statistic
from flora_train.evaluation.figures.texts import FIGURES
from flora_train.evaluation.seeds import seed_groups
from flora_train.training.embedding_heldout import HeldOutEmbeddings
from flora_train.training.heldout import HeldOut

NAMES = ("recall_at_1", "mrr", "contrastive_loss")
"""The figures, in the order of results."""


def embedding_figures(
    config: RunConfig, bank: AdapterBank, heldout: Mapping[str, HeldOut]
) -> list[FigureResult]:
    """The figures of every task of embeddings, whose unit of resampling is a pair or triplet."""
    results: list[FigureResult] = []
    for task, losses in heldout.items():
        if losses.embeddings is not None:
            results += _of_task(config, bank, task, losses.embeddings)
    return results


def _of_task(
    config: RunConfig, bank: AdapterBank, task: str, embeddings: HeldOutEmbeddings
) -> list[FigureResult]:
    options = config.evaluation
    statistics = {}
    for contender in embeddings.losses:
        values = (
            embeddings.first[contender],
            embeddings.reciprocal_ranks[contender],
            embeddings.losses[contender],
        )
        means = [mean_statistic(name, of_name) for name, of_name in zip(NAMES, values, strict=True)]
        statistics[contender] = combined(means)
    names = {BASE_ID: ContenderNames("base", "base")}
    names |= {i: ContenderNames(spec.name, spec.family) for i, spec in enumerate(bank.specs)}
    examples = len(next(iter(embeddings.losses.values())))
    figures = resampled_figures(
        statistics, examples, samples=options.bootstrap_samples, seed=seed_of(config.seed, task)
    )
    comparison = FigureComparison(
        task,
        figures,
        Contenders(names, seed_groups(bank.specs)),
        examples=examples,
        confidence=options.confidence,
        setting=f"{embeddings.spec.pooling} pooling, {embeddings.candidates:,} candidates",
    )
    return [comparison.result(name, FIGURES[name].lower_is_better) for name in NAMES]
