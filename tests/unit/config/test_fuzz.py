"""Whatever a recipe or a command line says, the answer is a configuration or one UserError, soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.cli import main
from flora_train.config.errors import UserError
from flora_train.config.load import load_config, load_saved, save_config, validate
from flora_train.config.schema import RunConfig
from flora_train.config.yaml_reader import YamlFaults, read
from flora_train.config.yaml_writer import write
from tests.unit.config.helpers import SMALL

pytestmark = pytest.mark.attack

SOON = 5.0
"""Seconds of the processor; far more than an answer takes."""

text = st.text(max_size=20) | st.sampled_from(
    [
        "${seed}",
        "${oc.env:HOME}",
        "${",
        "\\${x}",
        "../x",
        "~nobody/x",
        "a" * 300,
        "é" * 200,
        "no",
        "1e400",
        "\ud800",
        "\0",
        "device_slots",
    ]
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**70, 10**12, 10**400, 1e308, 1e-320, float("inf"), float("nan")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, text)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)


def paths(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every mapping's place in a nested mapping."""
    return [
        at,
        *(path for key, item in value.items() if isinstance(item, dict) for path in paths(item, (*at, key))),
    ]


FULL: dict[str, Any] = validate(
    {
        **SMALL,
        "adapters": {**SMALL["adapters"], "flora": {"method": "flora", "lr": [1e-3, 2e-3]}},
        "tasks": {
            **SMALL["tasks"],
            "sh": {"train": {"hub": "a/b"}, "validation": "x.jsonl", "sample_prompts": ["a"]},
        },
    }
).model_dump(mode="json")


def at(value: Any, path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        value = value[key]
    found: dict[str, Any] = value
    return found


ALL_KEYS = sorted({key for path in paths(FULL) for key in at(FULL, path)})


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A valid configuration with some values replaced, added, moved or taken away."""
    raw = deepcopy(FULL if draw(st.booleans()) else SMALL)
    for _ in range(draw(st.integers(1, 5))):
        section = at(raw, draw(st.sampled_from(paths(raw))))
        key = draw(
            st.sampled_from(sorted(section) or ["x"])
            if draw(st.integers(0, 3))
            else st.sampled_from(ALL_KEYS) | text
        )
        if draw(st.integers(0, 9)) == 0:
            section.pop(key, None)
        else:
            section[key] = draw(values)
    return raw


def answered(action: Callable[[], RunConfig]) -> RunConfig | None:
    """What an action gives, None for a UserError; it must not take long."""
    started = time.process_time()
    found, problems = None, ()
    try:
        found = action()
    except UserError as error:
        problems = error.problems
    assert found is not None or problems
    assert all(len(str(problem)) < 20_000 and "\n" not in str(problem) for problem in problems)
    assert time.process_time() - started < SOON
    return found


@given(recipes())
def test_any_mapping_is_a_configuration_or_one_error(raw: dict[str, Any]) -> None:
    answered(lambda: validate(raw))


@given(recipes())
def test_valid_configuration_round_trips(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]
) -> None:
    config = answered(lambda: validate(raw))
    if config is None:
        return
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    save_config(config, path)
    assert load_saved(path) == config
    assert load_config([f"recipe={path}"]) == config


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(list("{}[]&*!|>-:?,'\"%@`#\n \tab1~<=.\\")), max_size=40).map("".join)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = read(text)
    except YamlFaults:
        return
    if isinstance(found, dict):
        assert repr(read(write(found))) == repr(found)  # NaN is not equal to itself


@given(st.binary(max_size=80))
def test_any_file_is_a_recipe_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-bytes.yaml"
    path.write_bytes(content)
    answered(lambda: load_config([f"recipe={path}"]))


words = st.one_of(
    st.builds(
        lambda parts, value: f"{'.'.join(parts)}={value}",
        st.lists(st.sampled_from(ALL_KEYS) | st.text(max_size=5), min_size=1, max_size=4),
        values.map(str)
        | st.sampled_from(
            ["{a: &x [*x]}", "[" * 500, "{<<: 5}", "!!python/name:os.system", "1e999999999", "'", ""]
        ),
    ),
    st.sampled_from(
        ["--", "-", "+", "~a", "=", "=x", "--x", "--x=", "-m", "recipe", "recipe=", "a.b.", ".", "a" * 5000]
    ),
    st.text(max_size=20),
)


@given(st.lists(words, max_size=5))
def test_any_words_are_a_configuration_or_one_error(words: list[str]) -> None:
    config = answered(lambda: load_config(["recipe=quickstart", *words]))
    assert config is None or isinstance(config, RunConfig)


COMMANDS_ON_RUNS = ["train", "plan", "evaluate", "report", "solve", "execute", "export", "push"]


@given(
    st.sampled_from(COMMANDS_ON_RUNS),
    st.lists(
        words | st.sampled_from(["--out", "--rank", "--as", "out=x", "--out=x", "--repo=a/b"]), max_size=3
    ),
)
def test_a_command_without_a_run_is_answered_with_lines(
    capsys: pytest.CaptureFixture[str], command: str, words: list[str]
) -> None:
    assert main([command, *words]) == 2
    assert "Traceback" not in capsys.readouterr().err
