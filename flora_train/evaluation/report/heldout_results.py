"""Held-out results of tasks and sweeps: of the base, of every adapter, and of means over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.config.schema import RunConfig
from flora_train.data.splits import seed_of
from flora_train.evaluation.bootstrap import compare, compared_pairs, finite
from flora_train.evaluation.report.types import (
    BaseResult,
    ContenderResult,
    Difference,
    Retirement,
    SweepMember,
    SweepResult,
    TaskObjective,
    TaskResult,
)
from flora_train.evaluation.result_model import Interval
from flora_train.evaluation.seeds import (
    SeedGroup,
    compared_ids,
    deviation,
    group_ids,
    over_seeds,
    seed_groups,
)
from flora_train.training.heldout import HeldOut


def task_result(config: RunConfig, bank: AdapterBank, heldout: HeldOut) -> TaskResult:
    """The results on one task."""
    options, seed = config.evaluation, seed_of(config.seed, heldout.task)
    adapters = [adapter for adapter in heldout.nats if adapter != BASE_ID]
    groups = group_ids(seed_groups(bank.specs, heldout.task), adapters)
    with_means = _with_means(heldout, groups)
    comparison = compare(
        with_means, samples=options.bootstrap_samples, confidence=options.confidence, seed=seed
    )
    compared = compared_ids(adapters, groups)
    losses = {i: mean_loss(heldout, groups[i].members if i in groups else (i,)) for i in compared}
    measured = [i for i, loss in losses.items() if math.isfinite(loss)]
    best = min(measured, key=lambda i: losses[i], default=None)
    families = {i: bank.specs[i].family for i in adapters} | {i: group.family for i, group in groups.items()}

    def contender(i: int, name: str, bits_per_byte: Interval) -> ContenderResult:
        return ContenderResult(
            name=name,
            family=families[i],
            bits_per_byte=bits_per_byte,
            loss=finite(with_means.loss(i)),
            perplexity=_perplexity(with_means.loss(i)),
            difference_to_base=comparison.differences[i, BASE_ID].interval(),
            best=i == best,
        )

    bits = {i: estimate.interval() for i, estimate in comparison.contenders.items()}
    means = []
    for i, group in groups.items():
        spread = over_seeds(bits[i], (bits[member].value for member in group.members))
        means.append(contender(i, group.name, spread))
    differences = []
    for a, b in compared_pairs(compared, best):
        between = comparison.differences[a, b].interval()
        differences.append(Difference(first=families[a], second=families[b], bits_per_byte=between))
    return TaskResult(
        task=heldout.task,
        objective=objective_of(heldout),
        examples=len(heldout.label_bytes),
        label_tokens=int(heldout.label_tokens.sum()),
        label_bytes=int(heldout.label_bytes.sum()),
        confidence=options.confidence,
        base=BaseResult(
            bits_per_byte=bits[BASE_ID],
            loss=finite(heldout.loss(BASE_ID)),
            perplexity=_perplexity(heldout.loss(BASE_ID)),
        ),
        contenders=[contender(i, bank.specs[i].name, bits[i]) for i in adapters],
        over_seeds=means,
        differences=differences,
    )


def sweep_results(
    bank: AdapterBank,
    heldout: Mapping[str, HeldOut],
    retired: Mapping[str, Retirement],
    *,
    settings: Mapping[str, Mapping[str, float | str]],
) -> list[SweepResult]:
    """A result for every sweep and task. Seeds of a setting are one member, by their mean.

    retired: adapter name -> its retirement; settings: family -> values of the swept keys.
    """
    results = []
    for sweep, task in dict.fromkeys(
        (spec.sweep, spec.task) for spec in bank.specs if spec.sweep is not None
    ):
        specs = [spec for spec in bank.specs if (spec.sweep, spec.task) == (sweep, task)]
        by_setting: dict[str, list[AdapterSpec]] = {}
        for spec in specs:
            by_setting.setdefault(spec.seeds_of or spec.family, []).append(spec)
        members = []
        losses = {}
        for family, seeds in by_setting.items():
            ids = [bank.ids[spec.name] for spec in seeds]
            losses[family] = mean_loss(heldout[task], ids)
            members.append(
                _member(family, seeds, heldout[task], ids=ids, retired=retired).replace(
                    settings=dict(settings.get(seeds[0].family, {}))
                )
            )
        measured = [family for family, loss in losses.items() if math.isfinite(loss)]
        winner = min(measured, key=lambda family: losses[family], default=None)
        objective = objective_of(heldout[task])
        results.append(
            SweepResult(sweep=sweep, task=task, objective=objective, winner=winner, members=members)
        )
    return results


def objective_of(heldout: HeldOut) -> TaskObjective:
    if heldout.labels is not None:
        return "labels"
    if heldout.embeddings is not None:
        return "embeddings"
    return "sft" if heldout.preferences is None else heldout.preferences.objective


def mean_loss(heldout: HeldOut, adapters: Sequence[int]) -> float:
    """The loss that adapters of a task are compared by: of the objective, or bits per byte. Of several
    seeds, their mean."""
    return sum(_loss(heldout, adapter) for adapter in adapters) / len(adapters)


def _loss(heldout: HeldOut, adapter: int) -> float:
    if heldout.has_text and heldout.preferences is None:
        return heldout.bits_per_byte(adapter)
    return heldout.objective_loss(adapter)


def _member(
    family: str,
    seeds: Sequence[AdapterSpec],
    heldout: HeldOut,
    *,
    ids: Sequence[int],
    retired: Mapping[str, Retirement],
) -> SweepMember:
    """A setting's losses, and its retirement if all its seeds have retired."""
    preference_loss = bits_per_byte = None
    if objective_of(heldout) != "sft":
        preference_loss = finite(mean_loss(heldout, ids))
    if heldout.has_text:
        bits_per_byte = finite(sum(heldout.bits_per_byte(adapter) for adapter in ids) / len(ids))
    retirements = [retired[spec.name] for spec in seeds if spec.name in retired]
    retirement = None
    if len(retirements) == len(seeds):
        retirement = max(retirements, key=lambda entry: entry.step)
    return SweepMember(
        family=family,
        bits_per_byte=bits_per_byte,
        seeds=len(ids),
        deviation=deviation(_loss(heldout, adapter) for adapter in ids),
        preference_loss=preference_loss,
        retired=retirement,
    )


def _with_means(heldout: HeldOut, groups: Mapping[int, SeedGroup]) -> HeldOut:
    """The losses with those of each group: the mean over its seeds of every example's loss."""
    means = {}
    for i, group in groups.items():
        means[i] = np.mean([heldout.nats[member] for member in group.members], axis=0)
    return replace(heldout, nats={**heldout.nats, **means})


def _perplexity(loss: float) -> float | None:
    """exp(loss), limited to what a float can hold."""
    return finite(math.exp(min(loss, 700.0)))
