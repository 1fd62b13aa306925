"""Reward accuracy and margin on held-out preferences, with bootstrap intervals over pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.schema import RunConfig
from flora_train.data.splits import seed_of
from flora_train.evaluation.bootstrap import Estimator, compared_pairs, resampled_weights
from flora_train.evaluation.preferences.score_types import (
    PreferenceDifference,
    PreferenceResult,
    PreferenceScore,
)
from flora_train.evaluation.result_model import Interval
from flora_train.evaluation.seeds import SeedGroup, compared_ids, group_ids, over_seeds, seed_groups
from flora_train.training.heldout import HeldOut
from flora_train.training.preference_heldout import HeldOutPreferences

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class ContenderNames:
    """How results name a contender."""

    name: str
    family: str


@dataclass(frozen=True)
class _Resampled:
    """A figure on all examples, and on every resample of them."""

    value: float
    samples: Vector

    def __sub__(self, other: _Resampled) -> _Resampled:
        with np.errstate(invalid="ignore"):
            return _Resampled(self.value - other.value, self.samples - other.samples)


Figures = Mapping[str, _Resampled]
"""Name of a figure -> its values."""


def preference_results(
    config: RunConfig, bank: AdapterBank, heldout: Mapping[str, HeldOut]
) -> list[PreferenceResult]:
    """The result of every preference task. heldout: task -> held-out losses of base and adapters."""
    options = config.evaluation
    names = {BASE_ID: ContenderNames("base", "base")}
    names |= {i: ContenderNames(spec.name, spec.family) for i, spec in enumerate(bank.specs)}
    groups = seed_groups(bank.specs)
    results = []
    for task, losses in heldout.items():
        if losses.preferences is not None:
            result = preference_result(
                task,
                losses.preferences,
                names,
                samples=options.bootstrap_samples,
                confidence=options.confidence,
                seed=seed_of(config.seed, task),
                groups=groups,
            )
            results.append(result)
    return results


def preference_result(
    task: str,
    heldout: HeldOutPreferences,
    names: Mapping[int, ContenderNames],
    *,
    samples: int,
    confidence: float,
    seed: int,
    groups: Sequence[SeedGroup] = (),
) -> PreferenceResult:
    """Figures of every contender, and their differences, with intervals at `confidence`.

    names: of each contender id. samples: number of resamples; the unit of resampling is a pair, or a labelled
    row, the same for every contender. groups: adapters, of any task, that differ in their seed only.
    """
    ids = [BASE_ID, *(contender for contender in heldout.losses if contender != BASE_ID)]
    n = len(heldout.losses[BASE_ID])
    with np.errstate(invalid="ignore"):
        columns = {contender: _columns(heldout, contender) for contender in ids}
        figures = _figures(columns, heldout.labels, n, samples=samples, seed=seed)
    estimator = Estimator(confidence, single_example=n == 1)
    contenders = []
    for contender in ids:
        identity = names[contender]
        intervals = _intervals(figures[contender], estimator)
        contenders.append(PreferenceScore(name=identity.name, family=identity.family, **intervals))
    adapters = ids[1:]
    means, with_means, names = [], group_ids(groups, adapters), dict(names)
    for i, group in with_means.items():
        names[i] = ContenderNames(group.name, group.family)
        figures[i] = _mean_figures([figures[member] for member in group.members])
        spread = _with_deviations(_intervals(figures[i], estimator), figures, group)
        means.append(PreferenceScore(name=group.name, family=group.family, **spread))
    compared = compared_ids(adapters, with_means)
    pairs = [(adapter, BASE_ID) for adapter in (*adapters, *with_means)]
    pairs += compared_pairs(compared, _best(compared, figures))
    differences = []
    for first, second in pairs:
        between = {name: figures[first][name] - figures[second][name] for name in figures[first]}
        differences.append(
            PreferenceDifference(
                first=names[first].family, second=names[second].family, **_intervals(between, estimator)
            )
        )
    desirable = None
    if heldout.labels is not None:
        desirable = int(heldout.labels.sum())
    return PreferenceResult(
        task=task,
        objective=heldout.objective,
        beta=heldout.beta,
        examples=n,
        desirable=desirable,
        base_is_reference=heldout.objective != "orpo" and _rewards_are_zero(heldout),
        confidence=confidence,
        contenders=contenders,
        over_seeds=means,
        differences=differences,
    )


def rewards(heldout: HeldOutPreferences, contender: int) -> tuple[Vector, Vector]:
    """Rewards of chosen and of rejected completions; KTO: of the rows' completions, and none."""
    return (
        _reward(heldout, heldout.chosen, heldout.reference_chosen, heldout.chosen_tokens, contender),
        _reward(heldout, heldout.rejected, heldout.reference_rejected, heldout.rejected_tokens, contender),
    )


def _reward(
    heldout: HeldOutPreferences,
    logps: Mapping[int, Vector],
    references: Mapping[int, Vector],
    tokens: NDArray[np.int64],
    contender: int,
) -> Vector:
    if contender not in logps:
        return np.zeros(0)
    if heldout.objective == "orpo":
        return heldout.beta * logps[contender] / np.maximum(tokens, 1)
    if contender not in references:
        return np.zeros(len(logps[contender]))
    return heldout.beta * (logps[contender] - references[contender])


def _rewards_are_zero(heldout: HeldOutPreferences) -> bool:
    chosen, rejected = rewards(heldout, BASE_ID)
    return not chosen.any() and not rejected.any()


def _columns(heldout: HeldOutPreferences, contender: int) -> dict[str, Vector]:
    """Values of each example, whose sums give the figures."""
    chosen, rejected = rewards(heldout, contender)
    columns = {"loss": heldout.losses[contender]}
    if heldout.labels is not None:
        signed = np.where(heldout.labels, chosen, -chosen)
        columns["reward_accuracy"] = _share_positive(signed)
        columns["desirable"] = np.where(heldout.labels, chosen, 0.0)
        columns["undesirable"] = np.where(heldout.labels, 0.0, chosen)
        return columns
    logp, other = heldout.chosen[contender], heldout.rejected[contender]
    per_token = logp / np.maximum(heldout.chosen_tokens, 1) - other / np.maximum(heldout.rejected_tokens, 1)
    columns["reward_accuracy"] = _share_positive(chosen - rejected)
    columns["reward_margin"] = chosen - rejected
    columns["chosen_likelier"] = _share_positive(logp - other)
    columns["chosen_likelier_per_token"] = _share_positive(per_token)
    return columns


def _share_positive(values: Vector) -> Vector:
    """1 where positive, 0 where negative, 1/2 for ties, NaN for NaN."""
    return (np.sign(values) + 1) / 2


def _figures(
    columns: Mapping[int, Mapping[str, Vector]],
    labels: NDArray[np.bool_] | None,
    n: int,
    *,
    samples: int,
    seed: int,
) -> dict[int, dict[str, _Resampled]]:
    """Contender -> its figures on all examples and on every resample."""
    blocks: dict[tuple[int, str], list[Vector]] = {}
    desirable: list[Vector] = []
    for weights in resampled_weights(n, samples=samples, seed=seed):
        for contender, of_contender in columns.items():
            for name, values in of_contender.items():
                blocks.setdefault((contender, name), []).append(weights @ values)
        if labels is not None:
            desirable.append(weights @ labels)
    figures: dict[int, dict[str, _Resampled]] = {contender: {} for contender in columns}
    for (contender, name), sums in blocks.items():
        total = float(columns[contender][name].sum())
        figures[contender][name] = _Resampled(total / n, np.concatenate(sums) / n)
    if labels is not None:
        counts = np.concatenate(desirable)
        for contender in columns:
            figures[contender] = _with_margin_of_labels(figures[contender], labels, counts)
    return figures


def _with_margin_of_labels(
    figures: Mapping[str, _Resampled], labels: NDArray[np.bool_], counts: Vector
) -> dict[str, _Resampled]:
    """The figures with the margin of mean rewards, in place of the sums of either label.

    counts: desirable rows of each resample. A resample without rows of both labels has no margin (NaN).
    """
    n, desirable = len(labels), int(labels.sum())
    first, second = figures["desirable"], figures["undesirable"]
    with np.errstate(divide="ignore"):
        samples = n * first.samples / counts - n * second.samples / (n - counts)
    value = float("nan")
    if 0 < desirable < n:
        value = n * first.value / desirable - n * second.value / (n - desirable)
    kept = {name: figure for name, figure in figures.items() if name not in ("desirable", "undesirable")}
    both = (counts > 0) & (counts < n)
    return {**kept, "reward_margin": _Resampled(value, samples[both])}


def _intervals(figures: Figures, estimator: Estimator) -> dict[str, Interval | None]:
    intervals: dict[str, Interval | None] = {"chosen_likelier": None, "chosen_likelier_per_token": None}
    for name, figure in figures.items():
        samples = figure.samples
        if not len(samples):
            samples = np.full(1, np.nan)
        with np.errstate(invalid="ignore"):
            intervals[name] = estimator(figure.value, samples).interval()
    return intervals


def _mean_figures(seeds: Sequence[Figures]) -> dict[str, _Resampled]:
    """The means over seeds, on all examples and on every resample."""
    means = {}
    for name in seeds[0]:
        value = float(np.mean([figures[name].value for figures in seeds]))
        means[name] = _Resampled(value, np.mean([figures[name].samples for figures in seeds], axis=0))
    return means


def _with_deviations(
    intervals: Mapping[str, Interval | None], figures: Mapping[int, Figures], group: SeedGroup
) -> dict[str, Interval | None]:
    """The intervals of a group's means, with the deviations over its seeds."""
    spread: dict[str, Interval | None] = dict(intervals)
    for name, mean in intervals.items():
        if mean is not None:
            values = [float(figures[member][name].value) for member in group.members]
            spread[name] = over_seeds(mean, values)
    return spread


def _best(adapters: list[int], figures: Mapping[int, Figures]) -> int | None:
    """The adapter with the lowest loss."""
    losses = {adapter: figures[adapter]["loss"].value for adapter in adapters}
    finite = [adapter for adapter in adapters if np.isfinite(losses[adapter])]
    return min(finite, key=lambda adapter: losses[adapter], default=None)
