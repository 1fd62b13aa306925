"""Bits per byte of each language as Markdown, with paired intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flora_train.evaluation.bootstrap import Estimate, Estimator, resampled_weights

from .heldout import BASE, Heldout

SHARED = "lora"
"""The method that the others are compared with."""
TITLES = {
    BASE: "base",
    "lora": "one shared LoRA",
    "flora": "one shared fLoRA",
    "mixlora": "MixLoRA",
    "mixflora": "MixfLoRA",
    "switch": "LoRA-Switch",
    "meteora": "MeteoRA over LoRA of each language",
}
"""Method -> how the tables call it, in their order. Others follow."""
SAMPLES = 2000
CONFIDENCE = 0.95
CLEAR = "*"


@dataclass(frozen=True)
class Scores:
    """Bits per byte of one method: language -> the value and its resamples [SAMPLES], and of each seed."""

    values: Mapping[str, float]
    resampled: Mapping[str, NDArray[np.float64]]
    seeds: tuple[float, ...]
    """The mean over languages of each adapter."""

    @property
    def mean(self) -> float:
        """Over languages, each of which counts alike."""
        return float(np.mean(list(self.values.values())))

    @property
    def mean_resampled(self) -> NDArray[np.float64]:
        """[SAMPLES]: of the mean over languages, whose documents are resampled independently."""
        return np.mean(list(self.resampled.values()), axis=0)

    def estimate(self) -> Estimate:
        """The mean over languages."""
        return Estimator(CONFIDENCE, single_example=False)(self.mean, self.mean_resampled)

    def minus(self, other: Scores, language: str | None = None) -> Estimate:
        """The difference to another method, paired by document; of the mean over languages, or of one."""
        estimator = Estimator(CONFIDENCE, single_example=False)
        if language is None:
            return estimator(self.mean - other.mean, self.mean_resampled - other.mean_resampled)
        difference = self.values[language] - other.values[language]
        return estimator(difference, self.resampled[language] - other.resampled[language])

    @property
    def deviation(self) -> float | None:
        """Of the mean over languages, over seeds; None of one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None


def scores_of(heldout: Heldout) -> dict[str, Scores]:
    """Method -> its scores: means over seeds, with the same resamples of documents for all methods."""
    of_language = {name: np.array(heldout.languages) == name for name in dict.fromkeys(heldout.languages)}
    weights = {}
    for number, (name, chosen) in enumerate(of_language.items()):
        blocks = resampled_weights(int(chosen.sum()), samples=SAMPLES, seed=number)
        weights[name] = np.concatenate(list(blocks))
    scores = {}
    for method, adapters in heldout.nats.items():
        bits = {adapter: nats / np.log(2) for adapter, nats in adapters.items()}
        mean = np.mean(list(bits.values()), axis=0)
        values, resampled = {}, {}
        for name, chosen in of_language.items():
            sizes = heldout.sizes[chosen]
            values[name] = float(mean[chosen].sum() / sizes.sum())
            resampled[name] = (weights[name] @ mean[chosen]) / (weights[name] @ sizes)
        of_seeds = []
        for of_adapter in bits.values():
            parts = [of_adapter[c].sum() / heldout.sizes[c].sum() for c in of_language.values()]
            of_seeds.append(float(np.mean(parts)))
        scores[method] = Scores(values, resampled, tuple(of_seeds))
    return scores


def write_tables(heldout: Heldout) -> Iterator[str]:
    """All tables, one line after the other."""
    scores = scores_of(heldout)
    order = list(TITLES)
    methods = sorted(scores, key=lambda m: (order.index(m) if m in order else len(order), m))
    yield (
        "| method | parameters | bits per byte, mean over languages [95 %] | deviation over seeds | "
        "minus base | minus shared LoRA |"
    )
    yield "|---|---|---|---|---|---|"
    for method in methods:
        yield _summary_row(method, scores, heldout.parameters[method])
    yield ""
    yield "## Language by language"
    yield ""
    languages = list(dict.fromkeys(heldout.languages))
    counts = [sum(language == name for language in heldout.languages) for name in languages]
    heads = (f"{name} ({count})" for name, count in zip(languages, counts, strict=True))
    yield f"| method | {' | '.join(heads)} |"
    yield f"|---|{'---|' * len(languages)}"
    for method in methods:
        yield _language_row(method, scores, languages)
    yield ""
    yield (
        "In brackets the number of held-out documents. A star: the paired interval of the difference to the "
        "shared LoRA excludes zero; with so many cells, one in twenty does by chance."
    )


def _summary_row(method: str, scores: Mapping[str, Scores], parameters: int) -> str:
    own = scores[method]
    deviation = "" if own.deviation is None else f"{own.deviation:.4f}"
    cells = [TITLES.get(method, method), f"{parameters:,}", interval(own.estimate()), deviation]
    for other in (BASE, SHARED):
        difference = ""
        if other in scores and method not in (BASE, other):
            difference = interval(own.minus(scores[other]), signed=True)
        cells.append(difference)
    return f"| {' | '.join(cells)} |"


def _language_row(method: str, scores: Mapping[str, Scores], languages: list[str]) -> str:
    cells = [TITLES.get(method, method)]
    for name in languages:
        mark = ""
        if SHARED in scores and method not in (BASE, SHARED):
            is_clear = scores[method].minus(scores[SHARED], name).excludes_zero
            mark = CLEAR if is_clear else ""
        cells.append(f"{scores[method].values[name]:.3f}{mark}")
    return f"| {' | '.join(cells)} |"


def interval(estimate: Estimate, signed: bool = False) -> str:
    """`1.234 [1.200, 1.260]`."""
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
