"""The comparison of a server's log-probabilities with the trainer's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from flora_train.commands.serve_check import (
    Comparison,
    Expected,
    Reference,
    check_comparisons,
    compare_one,
    print_comparisons,
)
from flora_train.config.errors import UserError

EXPECTED = Expected((5, 6, 7), (-1.0, -2.0), (8, 9, 4), (-0.5, -0.25, -3.0))


def answer(tokens: tuple[int, ...], values: tuple[float, ...], read: tuple[float, ...] = (-1.0, -2.0)) -> Any:
    prompt = [None, *({str(token): {"logprob": v}} for token, v in zip((6, 7), read, strict=True))]
    logprobs = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": list(values)}
    return {"choices": [{"prompt_logprobs": prompt, "logprobs": logprobs}]}


def compared(content: Any) -> Comparison:
    asked: list[Mapping[str, Any]] = []

    def post(path: str, request: Mapping[str, Any]) -> Any:
        asked.append(request)
        return content

    result = compare_one("lua", EXPECTED, post)
    assert asked[0]["model"] == "lua"
    assert asked[0]["prompt"] == [5, 6, 7]
    return result


def test_equal_answers_have_no_difference() -> None:
    assert compared(answer((8, 9, 4), (-0.5, -0.25, -3.0))) == Comparison("lua", 5, 0.0, True)


def test_prompt_and_continuation_are_compared() -> None:
    assert compared(answer((8, 9, 4), (-0.5, -0.25, -3.5))).difference == 0.5
    assert compared(answer((8, 9, 4), (-0.5, -0.25, -3.0), (-1.0, -2.75))).difference == 0.75


def test_after_another_token_nothing_is_compared() -> None:
    assert compared(answer((8, 1, 4), (-0.5, -0.25, -90.0))) == Comparison("lua", 4, 0.0, False)
    assert compared(answer((1, 9, 4), (-0.6, -90.0, -90.0))).difference == pytest.approx(0.1)


def test_no_number_is_a_difference() -> None:
    assert compared(answer((8, 9, 4), (math.nan, -0.25, -3.0))).difference == math.inf


@pytest.mark.parametrize(
    "content", [{}, {"choices": []}, answer((8,), (-0.5,)) | {"choices": [{"logprobs": None}]}]
)
def test_an_answer_without_numbers_is_an_error(content: Any) -> None:
    with pytest.raises(UserError, match="answered without log-probabilities"):
        compared(content)


def test_a_difference_above_the_tolerance_names_the_worst(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Comparison("base", 9, 1e-6, True),
        Comparison("a\x1b", 9, 0.5, False),
        Comparison("b", 9, 0.1, True),
    ]
    before = Expected((5, 6, 7), (-1.5, -2.0), (8,), (-0.5,))
    expected = {"base": [before], "a\x1b": [EXPECTED], "b": [before]}
    print_comparisons(results, Reference(expected, torch.float32), 1e-3)
    table = capsys.readouterr().out
    assert re.search(r"5\.00e-01 +0\.50 +differ", table)
    assert re.search(r"1\.00e-01 +0\.00 +the same", table)
    assert "\x1b" not in table
    with pytest.raises(UserError, match=r"differ by up to 5.00e-01 .* 2 of 3 models"):
        check_comparisons(results, 1e-3)
    check_comparisons(results, 0.6)
    with pytest.raises(UserError):
        check_comparisons([Comparison("base", 9, math.nan, True)], 1.0)
