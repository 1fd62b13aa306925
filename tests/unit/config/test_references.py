"""`${key}` is the value of another key; the environment is never read, and endless references are refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.load import load_config, save_config
from flora_train.config.references import escape, resolve
from tests.unit.config.helpers import refusal

CANARY = "planted-secret-value"


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({"a": "${b}", "b": 3}, {"a": 3, "b": 3}),
        ({"a": "x${b.c}y", "b": {"c": 1e-3}}, {"a": "x0.001y", "b": {"c": 1e-3}}),
        ({"a": "${b}", "b": "${c}", "c": [1]}, {"a": [1], "b": [1], "c": [1]}),
        ({"a": {"x": 1, "y": "${.x}", "z": {"w": "${..x}"}}}, {"a": {"x": 1, "y": 1, "z": {"w": 1}}}),
        ({"a": ["${a[1]}", 5, "${a.1}"]}, {"a": [5, 5, 5]}),
        ({"a": "\\${b}", "b": 1}, {"a": "${b}", "b": 1}),
        ({"a": "\\\\${b}", "b": 1}, {"a": "\\1", "b": 1}),
        ({"a": "$b {c}"}, {"a": "$b {c}"}),
    ],
)
def test_references_are_the_values_that_they_name(raw: dict[str, Any], found: dict[str, Any]) -> None:
    assert resolve(raw) == found


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"a": "${a}"}, "a = '${a}': refers to itself"),
        ({"a": {"b": "${c}"}, "c": {"d": "${a}"}}, "refers to itself"),
        ({"a": ["${a}"]}, "refers to itself"),
        ({"a": "${b.c}", "b": 1}, "a = '${b.c}': refers to b.c, which is not a key"),
        ({"a": "${b"}, "has ${ without a closing }"),
        ({"a": "${}"}, "is not a key such as"),
        ({"a": "${${b}}", "b": "c"}, "is not a key such as"),
        ({"a": "x${b}", "b": {"c": 1}}, "puts b, which holds keys or a list, into a text"),
        (
            {f"a{i}": f"${{a{i + 1}}}${{a{i + 1}}}" for i in range(60)} | {"a60": "xx"},
            "becomes a text of more than 1,000,000",
        ),
        (
            {f"a{i}": [f"${{a{i - 1}}}"] * 10 if i else [1] for i in range(12)},
            "stand for more than 1,000,000 values",
        ),
        (
            {f"a{i}": f"${{a{i + 1}}}" for i in range(5000)} | {"a5000": 1},
            "is a chain of more than 64 references",
        ),
        ({f"a{i}": [f"${{a{i - 1}}}"] if i else [1] for i in range(5000)}, "nests more than 64 levels deep"),
    ],
)
def test_invalid_or_endless_references_are_an_error_at_once(raw: dict[str, Any], line: str) -> None:
    started = time.process_time()
    assert line in str(refusal(lambda: resolve(raw))[0])
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "reference",
    ["oc.env:TOKEN", "oc.env:TOKEN,x", "oc.decode:${oc.env:TOKEN}", "oc.select:seed", "env:TOKEN", "my:x"],
)
def test_resolvers_are_refused_and_the_secret_is_in_no_error(
    monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.setenv("TOKEN", CANARY)
    for word in (f"tracking.group=${{{reference}}}", f"tasks.lua.train='a ${{{reference}}}'"):
        problems = refusal(lambda word=word: load_config(["recipe=quickstart", word]))
        assert "is a resolver, which is not supported" in str(problems[0])
        assert "HF_TOKEN, WANDB_API_KEY" in str(problems[0])
        assert CANARY not in str(problems)


def test_escaped_reference_to_the_environment_stays_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", CANARY)
    config = load_config(["recipe=quickstart", "tracking.group=\\${oc.env:TOKEN}"])
    assert config.tracking.group == "${oc.env:TOKEN}"
    save_config(config, tmp_path / "config.yaml")
    assert CANARY not in (tmp_path / "config.yaml").read_text()
    assert load_config([f"recipe={tmp_path}/config.yaml"]) == config


@pytest.mark.parametrize("text", ["${x}", "\\${x}", "\\\\${x} \\${y}\\", "${", "\\", "$", "\\\\\\${${"])
def test_escaped_text_is_read_back_literally(text: str) -> None:
    assert resolve({"a": escape(text)}) == {"a": text}
