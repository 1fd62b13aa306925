"""A function of the user's own is imported and tried before training; what is wrong with it is one error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.figures.own_metric import (
    MOST_CALLS,
    TRIED_RESAMPLES,
    load_own_metric,
    lower_is_better,
    own_statistic,
    own_value,
)

KEY = "tasks.lua.metrics"
MODULE = """
import math
import numpy as np

def good(predictions, references):
    return np.float32(0.5)

def whole(predictions, references):
    return 3

def lower(predictions, references):
    return 0.25
lower.lower_is_better = True

def none(predictions, references):
    pass

def text(predictions, references):
    return "0.5"

def nan(predictions, references):
    return math.nan

def several(predictions, references):
    return {"score": 1.0}

def yes(predictions, references):
    return True

def large(predictions, references):
    return 10 ** 400

def raises(predictions, references):
    return 1 / 0

def leaves(predictions, references):
    raise SystemExit("no")

def one(predictions):
    return 1.0

async def later(predictions, references):
    return 1.0

class Kept:
    @staticmethod
    def score(predictions, references):
        return len(predictions)

number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module as the working folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_functions.py").write_text(MODULE)
    (folder / "own_broken.py").write_text("import nothing_of_this_name\n")
    (folder / "own_wrong.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    return folder


def test_functions_that_return_numbers() -> None:
    for name, value in {"good": 0.5, "whole": 3.0, "lower": 0.25, "Kept.score": 2.0}.items():
        function = load_own_metric(f"own_functions:{name}", KEY)
        assert own_value(function, ["a", "b"], ["a", "c"]) == value
        assert lower_is_better(function) == (name == "lower")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("own_functions:none", "returned None for 3 made texts"),
        ("own_functions:text", "returned the text '0.5' for"),
        ("own_functions:nan", "returned nan for"),
        ("own_functions:several", "returned a dict for"),
        ("own_functions:yes", "returned a bool for"),
        ("own_functions:large", "returned inf for"),
        ("own_functions:raises", "raised ZeroDivisionError: division by zero for"),
        ("own_functions:leaves", "raised SystemExit: no for"),
        ("own_functions:one", "raised TypeError: one() takes 1 positional argument but 2 were given"),
        ("own_functions:later", "returned a coroutine for"),
        ("own_functions:number", "is no function, but of the type int: it must be a function"),
        ("own_functions:goood", "own_functions has no goood. Did you mean 'good'?"),
        ("own_nowhere:f", "there is no module own_nowhere: write it into"),
        ("own_nowhere.deeper:f", "there is no module own_nowhere: write it into"),
        ("own_functions.deeper:f", "there is no module own_functions.deeper: write it into"),
        ("own_broken:f", "own_broken cannot be imported (ModuleNotFoundError: No module named 'nothing_of"),
        ("own_wrong:f", "own_wrong cannot be imported (SyntaxError: "),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_is_wrong_is_one_error(metric: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_own_metric(metric, KEY)
    (problem,) = error.value.problems
    assert str(problem).startswith(f"{KEY} = '{metric}': ")
    assert message in str(problem)
    assert "\n" not in str(problem)


def test_means_over_examples_are_called_once_for_each() -> None:
    calls = []

    def share(predictions: list[str], references: list[str]) -> float:
        calls.append(len(predictions))
        return sum(p == y for p, y in zip(predictions, references, strict=True)) / len(predictions)

    statistic = own_statistic(share, "m:share", ["a", "b", "c"], ["a", "x", "c"])
    assert calls[:4] == [3, 1, 1, 1]
    assert calls[4:] == [3] * TRIED_RESAMPLES
    calls.clear()
    weights = np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0], [2.0, 1.0, 0.0]])
    assert statistic(weights)["m:share"] == pytest.approx([2 / 3, 0.0, 2 / 3])
    assert not calls


def test_a_figure_that_equals_the_mean_by_chance_is_resampled() -> None:
    """Macro F1 is the accuracy where the errors of two equally frequent labels are equal."""

    def macro_f1(predictions: list[str], references: list[str]) -> float:
        scores = []
        for label in sorted({*predictions, *references}):
            pairs = list(zip(predictions, references, strict=True))
            hits = sum(p == y == label for p, y in pairs)
            scores.append(2 * hits / (predictions.count(label) + references.count(label)))
        return sum(scores) / len(scores)

    predictions, references = ["a", "a", "b", "b", "a", "b"], ["a", "a", "b", "b", "b", "a"]
    statistic = own_statistic(macro_f1, "m:macro", predictions, references)
    weights = np.array([[3.0, 0.0, 1.0, 0.0, 2.0, 0.0]])
    expected = macro_f1(["a", "a", "a", "b", "a", "a"], ["a", "a", "a", "b", "b", "b"])
    assert statistic(weights)["m:macro"] == pytest.approx([expected])
    assert expected != pytest.approx(4 / 6)


def test_others_are_called_for_resamples() -> None:
    def distinct(predictions: list[str], references: list[str]) -> float:
        if len(set(predictions)) == 1:
            raise ValueError("all alike")
        return len(set(predictions))

    statistic = own_statistic(distinct, "m:distinct", ["a", "b", "c"], ["", "", ""])
    values = statistic(np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0], [2.0, 1.0, 0.0]]))["m:distinct"]
    assert values[[0, 2]].tolist() == [3.0, 2.0]
    assert np.isnan(values[1])
    many = statistic(np.ones((2 * MOST_CALLS, 3)))["m:distinct"]
    assert np.isfinite(many).sum() == MOST_CALLS + 1 - 3


def test_a_function_that_fails_on_the_answers_says_why() -> None:
    def fails(predictions: list[str], references: list[str]) -> float:
        raise KeyError("x")

    with pytest.raises(ValueError, match="raised KeyError: 'x'"):
        own_statistic(fails, "m:fails", ["a"], ["a"])
