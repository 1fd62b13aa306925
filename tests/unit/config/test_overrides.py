"""The command line: key=value, and one helpful line for every other dialect."""

from __future__ import annotations

import pytest

from flora_train.config.overrides import parse_overrides
from tests.unit.config.helpers import refusal


@pytest.mark.parametrize(
    ("words", "layer"),
    [
        (["tasks.lua.weight=2"], {"tasks": {"lua": {"weight": 2}}}),
        (["a.b=1", "a.c=[x, y]"], {"a": {"b": 1, "c": ["x", "y"]}}),
        (["adapters.x={method: ia3, lr: 1e-3}"], {"adapters": {"x": {"method": "ia3", "lr": 1e-3}}}),
        (["a=1", "a=2"], {"a": 2}),
        (["a=", "b=null"], {"a": None, "b": None}),
        (["a=b=c"], {"a": "b=c"}),
        (['text="{doc} {code}"'], {"text": "{doc} {code}"}),
        (["a=${b}"], {"a": "${b}"}),
    ],
)
def test_words_spell_a_mapping(words: list[str], layer: dict[str, object]) -> None:
    assert parse_overrides(words) == layer


NO_MULTIRUN = "is Hydra syntax: there is no multirun, because every adapter of a recipe trains in one run"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["+a.b=1"], "+a.b=1: is Hydra syntax: write a.b=1, keys need no +"),
        (["++a.b=1"], "++a.b=1: is Hydra syntax: write a.b=1, keys need no +"),
        (["~a.b"], "~a.b: is Hydra syntax: keys cannot be removed; write a.b=VALUE to change it"),
        (["~adapters.lora"], "~adapters.lora: is Hydra syntax: write adapters.lora=null to leave it out"),
        (["-m"], f"-m: {NO_MULTIRUN}"),
        (["--multirun"], f"--multirun: {NO_MULTIRUN}"),
        (["--a.b", "5"], "--a.b 5: options are written key=value: a.b=5"),
        (["--a.b=5"], "--a.b=5: options are written key=value: a.b=5"),
        (["--tasks.a-b.max-examples=5"],
         "--tasks.a-b.max-examples=5: options are written key=value: tasks.a-b.max_examples=5"),
        (["--resume"], "--resume: options are written key=value: resume=VALUE"),
        (["quickstart"], "quickstart: expected key=value. Did you mean recipe=quickstart?"),
        (["quikstart"], "quikstart: expected key=value. Did you mean 'quickstart'?"),
        (["zzzz"], "zzzz: expected key=value."),
        (["=5"], "=5: expected key=value."),
        (["recipe=a", "recipe=b"], "recipe: is given 2 times: give one"),
    ],
)  # fmt: skip
def test_other_dialect_is_answered_with_one_helpful_line(words: list[str], line: str) -> None:
    assert [str(problem) for problem in refusal(lambda: parse_overrides(words))] == [line]


def test_option_does_not_swallow_a_word_that_stands_for_itself() -> None:
    problems = refusal(lambda: parse_overrides(["--a", "b=1", "--c", "-m", "d=2"]))
    assert [problem.key for problem in problems] == ["--a", "--c", "-m"]


def test_value_that_yaml_cannot_read_is_named_with_the_fix() -> None:
    (problem,) = refusal(lambda: parse_overrides(["a=1", "tasks.lua.text={doc} {code}"]))
    assert problem.key == "tasks.lua.text"
    assert problem.value == "{doc} {code}"
    assert problem.hint.endswith("text needs its own quotes: 'tasks.lua.text=\"...\"'")


def test_invalid_arguments_are_reported_together() -> None:
    assert len(refusal(lambda: parse_overrides(["+a=1", "~b", "c=[", "d", "e=1"]))) == 4


@pytest.mark.parametrize(
    "word", ["a..b=1", ".a=1", "a.=1", "a =1", " a=1", ".=1", f"{'a.' * 20}a=1", "a\ud800=1", "a=\ud800"]
)
def test_key_that_is_none_is_refused(word: str) -> None:
    assert len(refusal(lambda: parse_overrides([word]))) == 1
