"""A metric of the user's own: imported, tried before training, and resampled."""

from __future__ import annotations

import importlib
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import UserError, did_you_mean, first_line, user_error
from flora_train.evaluation.figures.statistic import Matrix, Statistic, Vector

OwnMetric = Callable[[list[Any], list[Any]], Any]
"""Called with the answers and the completions of the same examples, or with predicted labels and labels."""

TRIED = (("one answer", "one answer"), ("", "a completion"), ("žluťoučký 42", "kůň\n42"))
"""Answers and completions that a function is called with before training."""
TRIED_RESAMPLES = 3
"""Resamples on which a function has to equal the mean over examples in order to be taken for one."""
MOST_CALLS = 200
"""Resamples of a function that is no mean over examples: it is called for each of them."""
SAME = 1e-9


def load_own_metric(metric: str, key: str) -> OwnMetric:
    """The function of a metric `module:function` of texts, after it was called with a few made ones.

    Raises UserError with the key if it cannot be imported, raises, or returns no finite number.
    """
    function = import_own_metric(metric, key)
    predictions, references = zip(*TRIED, strict=True)
    try_own_metric(function, predictions, references, metric=metric, key=key, examples="made texts")
    return function


def import_own_metric(metric: str, key: str) -> OwnMetric:
    """The function of a metric `module:function`, which is not called.

    Modules are found as by `python -m`: also in the folder that the program was started in. Raises UserError
    with the key if it cannot be imported.
    """
    module_name, _, function_name = metric.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _not_importable(metric, key, module_name, error) from error
        file = module_name.replace(".", "/") + ".py"
        hint = f"there is no module {error.name}: write it into {Path(folder) / file}, or install it"
        raise user_error(key, metric, hint) from error
    except (Exception, SystemExit) as error:
        raise _not_importable(metric, key, module_name, error) from error
    for part in function_name.split("."):
        if not hasattr(function, part):
            hint = f"{module_name} has no {part}.{did_you_mean(part, vars(function))}"
            raise user_error(key, metric, hint)
        function = getattr(function, part)
    if not callable(function):
        hint = (
            f"is no function, but of the type {type(function).__name__}: it must be a function of "
            "(predictions, references)"
        )
        raise user_error(key, metric, hint)
    return function


def lower_is_better(function: OwnMetric) -> bool:
    """Whether the function says, by an attribute `lower_is_better`, that lower values are better."""
    return bool(getattr(function, "lower_is_better", False))


def own_value(function: OwnMetric, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """What the function returns. Raises ValueError with the reason if it raises or gives no finite number."""
    try:
        value = function(list(predictions), list(references))
    except (Exception, SystemExit) as error:
        raise ValueError(f"raised {type(error).__name__}: {first_line(error)}") from error
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array or tensor of one number
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"returned {_described(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"returned {number}")
    return number


def own_statistic(
    function: OwnMetric, name: str, predictions: Sequence[Any], references: Sequence[Any]
) -> Statistic:
    """The figure of a function, on all examples and on resamples. Raises ValueError as `own_value` does.

    A function that is the mean of its values of single examples, also on a few resamples, is called once for
    each example; others are called for each of the first MOST_CALLS resamples. Where it raises or returns no
    number, the figure is undefined.
    """
    value = own_value(function, predictions, references)
    single = [_value_or_nan(function, [p], [y]) for p, y in zip(predictions, references, strict=True)]
    numbers_of_examples = np.asarray(single)
    resampling = _Resampling(function, name, predictions, references)
    if _same(numbers_of_examples.mean(), value) and _is_mean(numbers_of_examples, resampling):
        return lambda weights: {name: weights @ numbers_of_examples / weights.sum(axis=1)}
    return resampling


def _is_mean(values: Vector, resampling: _Resampling) -> bool:
    """Whether the function is the mean of its values of single examples on a few resamples, too."""
    generator = np.random.default_rng(0)
    for _ in range(TRIED_RESAMPLES):
        weights = np.bincount(generator.integers(len(values), size=len(values)), minlength=len(values))
        mean = float(weights @ values) / len(values)
        if not _same(mean, resampling.value_of(weights)):
            return False
    return True


def _same(mean: float, value: float) -> bool:
    return abs(mean - value) <= SAME * max(1.0, abs(value))


class _Resampling:
    """The figure of a function that is called with the examples of each resample."""

    def __init__(
        self, function: OwnMetric, name: str, predictions: Sequence[Any], references: Sequence[Any]
    ) -> None:
        self.function, self.name = function, name
        self.predictions, self.references = predictions, references
        self.calls = 0

    def __call__(self, weights: Matrix) -> dict[str, Vector]:
        values = np.full(len(weights), np.nan)
        for i, row in enumerate(weights):
            if self.calls > MOST_CALLS:
                break
            self.calls += 1
            values[i] = self.value_of(row)
        return {self.name: values}

    def value_of(self, weights: NDArray[Any]) -> float:
        """The function of the examples, each as often as its weight says; NaN where it has no value."""
        drawn = np.repeat(np.arange(len(weights)), weights.astype(np.int64)).tolist()
        predictions = [self.predictions[example] for example in drawn]
        references = [self.references[example] for example in drawn]
        return _value_or_nan(self.function, predictions, references)


def _value_or_nan(function: OwnMetric, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    try:
        return own_value(function, predictions, references)
    except ValueError:
        return math.nan


def try_own_metric(
    function: OwnMetric,
    predictions: Sequence[Any],
    references: Sequence[Any],
    *,
    metric: str,
    key: str,
    examples: str,
) -> None:
    """Raises UserError unless the function returns a number for these examples. examples: what they are."""
    try:
        own_value(function, predictions, references)
    except ValueError as error:
        hint = (
            f"{error} for {len(predictions)} {examples}: it is called with two lists of equal length, "
            "predictions and references, and must return one finite number"
        )
        raise user_error(key, metric, hint) from error


def _described(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return f"a {type(value).__name__}"


def _not_importable(metric: str, key: str, module: str, error: BaseException) -> UserError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return user_error(
        key, metric, f"{module} cannot be imported ({reason}): correct it, or install what it needs"
    )
