"""No number, name or list of a configuration is so large that a later stage crashes, hangs or overflows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flora_train.commands.convert import ConvertOptions
from flora_train.commands.execute import ExecuteOptions
from flora_train.commands.export import ExportOptions
from flora_train.commands.push import PushOptions
from flora_train.config.base import ConfigModel
from flora_train.config.load import load_config, validate
from flora_train.config.schema import RunConfig
from tests.unit.config.helpers import SMALL, faults, loading_faults, refusal, small


def numbers(schema: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Place and JSON schema of every number."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield at, schema
        for key, part in schema.items():
            yield from numbers(part, f"{at}.{key}")
    elif isinstance(schema, list):
        for part in schema:
            yield from numbers(part, at)


@pytest.mark.parametrize("kind", [RunConfig, ExecuteOptions, ExportOptions, ConvertOptions, PushOptions])
def test_every_number_has_a_least_and_a_largest_value(kind: type[ConfigModel]) -> None:
    found = list(numbers(kind.model_json_schema()))
    assert found
    for at, schema in found:
        assert schema.keys() & {"maximum", "exclusiveMaximum"}, at
        assert schema.keys() & {"minimum", "exclusiveMinimum"} or at.endswith("rungs.anyOf.items"), at


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("seed", -1, "at least 0"),
        ("seed", 2**70, "at most 9,223,372,036,854,775,807"),
        ("num_threads", 100_000, "at most 1,024"),
        ("num_processes", 10**9, "at most 100,000"),
        ("tasks__lua__weight", 1e308, "at most 1,000,000"),
        ("tasks__lua__weight", 1e-300, "at least 1e-06"),
        ("tasks__lua__max_examples", 10**30, "at most 1,000,000,000"),
        ("adapters__lora__lr", float("inf"), "finite number"),
        ("adapters__lora__lr", float("nan"), "finite number"),
        ("adapters__lora__lr", 1e300, "at most 1e+30"),
        ("adapters__lora__rank", 10**9, "at most 8,192"),
        ("adapters__lora__weight_decay", 2000, "times lr = 0.001 is more than 1"),
        ("adapters__lora__max_grad_norm", 1e308, "at most 1e+30"),
        ("training__steps", 10**12, "at most 10,000,000"),
        ("training__max_length", 10**9, "at most 100,000,000"),
        ("training__tokens_per_step", 10**12, "at most 100,000,000"),
        ("training__eps", 1e-320, "at least 1e-30"),
        ("training__betas", [0.9, 1.0], "less than 1"),
        ("training__betas", [0.9, -1e308], "at least 0"),
        ("training__keep_checkpoints", 10**9, "at most 100,000"),
        ("evaluation__bootstrap_samples", 10**9, "at most 100,000"),
        ("evaluation__workers", 10**6, "at most 1,024"),
        ("evaluation__temperature", 1e-30, "must be 0 (greedy), or at least 0.001"),
        ("evaluation__temperature", 1e308, "at most 100"),
        ("evaluation__top_p", 1e-300, "at least 1e-06"),
        ("evaluation__num_samples", 10**9, "at most 10,000"),
        ("evaluation__max_new_tokens", 10**12, "at most 1,000,000"),
        ("evaluation__cpu_seconds", 1e-9, "at least 0.01"),
        ("evaluation__cpu_seconds", 1e308, "at most 86,400"),
        ("audio__window_step", 1e-9, "at least 0.02"),
        ("audio__cache_gigabytes", 1e308, "at most 1,000,000"),
        ("audio__workers", 10**6, "at most 1,024"),
        ("mixture__examples_per_draw", 10**12, "at most 1,000,000"),
        ("guard__window", 10**9, "at most 10,000"),
        ("paging__device_slots", 10**12, "at most 1,000,000"),
    ],
)
def test_extreme_number_is_refused_with_the_limit(key: str, value: Any, hint: str) -> None:
    found = faults(**{key: value})
    dotted = key.replace("__", ".")
    assert any(place.startswith(dotted) and hint in line for place, line in found.items()), found


@pytest.mark.parametrize(
    "word",
    [
        "adapters.lora.lr=1e400",
        "seed=" + "9" * 6000,
        "training.steps=" + "9" * 400,
        "seed=-1",
        "seed=0x" + "F" * 99,
    ],
)
def test_extreme_number_on_the_command_line_is_one_line(word: str) -> None:
    (line,) = loading_faults("recipe=quickstart", word)
    assert line.startswith(word.partition("=")[0])
    assert len(line) < 300


def test_temperature_of_the_mixture_overflows_for_no_sizes() -> None:
    import numpy as np

    from flora_train.config.training_schema import MixtureConfig
    from flora_train.data.mixture import Stream, TaskMixture

    sizes = {"large": 2000, "small": 4}
    streams = [
        Stream(name, np.full(n, 8), 1e6 if n > 4 else 1e-6, {f"{name}-lora": 3 if n > 4 else 9})
        for name, n in sizes.items()
    ]
    config = MixtureConfig(strategy="temperature", temperature=0.01)
    mixture = TaskMixture(streams, config, tokens_per_step=16, seed=0)
    drawn = [{draw.task for draw in mixture.step(number)} for number in range(12)]
    assert (
        drawn == [{"large"}] * 3 + [{"small"}] * 9
    )  # the large one is drawn alone while it is there, and then the other


def test_sweep_of_a_million_is_refused_before_it_is_expanded() -> None:
    thousand = [i * 1e-6 for i in range(1, 1001)]
    started = time.process_time()
    for raw in (
        {"method": "lora", "lr": thousand, "alpha": list(range(1, 1001))},
        {"method": "lora", "lr": [i * 1e-9 for i in range(1, 1_000_001)]},
    ):
        (problem,) = refusal(lambda raw=raw: validate({**SMALL, "adapters": {"x": raw}}))
        assert "1,000,000" in problem.hint
        assert "at most 10,000 adapters are made by sweeps" in problem.hint
        assert problem.key.startswith("adapters.x")
    assert time.process_time() - started < 2


def test_sweep_over_a_number_in_quotes_is_harmless() -> None:
    started = time.process_time()
    assert faults(adapters={"x": {"method": "lora", "lr": ["1e99999999", 1]}})
    assert time.process_time() - started < 1


def test_more_adapters_than_one_run_trains_are_counted_before_they_are_made() -> None:
    tasks = {f"t{i}": {"train": "x"} for i in range(5000)}
    adapters = {f"a{i}": {"method": "lora", "lr": 1.0} for i in range(5000)}
    started = time.process_time()
    (problem,) = refusal(lambda: validate({**SMALL, "tasks": tasks, "adapters": adapters}))
    assert "are 25,000,000" in problem.hint
    assert "at most 100,000 fit into a run" in problem.hint
    assert time.process_time() - started < 5


def test_thousands_of_equal_faults_are_answered_soon_and_not_all_listed() -> None:
    tasks = {f"t{i}": {"trian": "x", "truncation": "dorp"} for i in range(5000)}
    adapters = {f"a{i}": {"method": "lora", "lr": 1.0, "tasks": [f"u{i}"]} for i in range(5000)}
    started = time.process_time()
    problems = refusal(lambda: validate({**SMALL, "tasks": tasks, "adapters": adapters}))
    assert 50 <= len(problems) <= 200
    assert all(len(str(problem)) < 5000 for problem in problems)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("changes", "key", "hint"),
    [
        ({"name": "n" * 201}, "name", "at most 200 characters"),
        ({"tasks": {"t" * 201: {"train": "x"}}}, "tasks." + "t" * 201, "at most 200 characters"),
        (
            {"tasks": {"t" * 150: {"train": "x"}}, "adapters": {"a" * 60: {"method": "ia3", "lr": 1}}},
            "adapters",
            "has more than 200 characters",
        ),
        ({"tasks": {"Lua": {"train": "x"}, "lua": {"train": "x"}}}, "adapters", "differ in case only"),
        (
            {"adapters": {"LORA": {"method": "ia3", "lr": 1}, "lora": {"method": "ia3", "lr": 1}}},
            "adapters",
            "differ in case only",
        ),
        ({"output_dir": "x" * 300}, "output_dir", "too long for a path"),
        ({"output_dir": "é" * 200}, "output_dir", "too long for a path"),
        ({"output_dir": "x/" * 3000}, "output_dir", "too long for a path"),
        ({"model": {"path": "x" * 300}}, "model.path", "too long for a path"),
        ({"tasks": {"a": {"train": "x" * 300}}}, "tasks.a.train", "too long for a path"),
        ({"tasks": {"a": {"train": {"folder": "x" * 300}}}}, "tasks.a.train.folder", "too long for a path"),
        ({"output_dir": "a\0b"}, "output_dir", "a null character"),
        ({"output_dir": "a\ud800"}, "output_dir", "not valid UTF-8"),
    ],
)
def test_name_that_no_file_can_have_is_refused(changes: dict[str, Any], key: str, hint: str) -> None:
    found = {problem.key: problem.hint for problem in refusal(lambda: validate({**SMALL, **changes}))}
    assert hint in found[key], found


def test_longest_names_fit_into_the_file_system(tmp_path: Path) -> None:
    config = validate(
        {**SMALL, "tasks": {"t" * 139: {"train": "x"}}, "adapters": {"a" * 60: {"method": "ia3", "lr": 1}}}
    )
    (task,), (adapter,) = config.tasks, config.adapters
    (tmp_path / f".{task}-{adapter}.safetensors.{2**22}.tmp").touch()


def test_home_of_an_unknown_user_stays_as_it_is_written() -> None:
    assert validate(small(output_dir="~nobody-here/x")).folder == "~nobody-here/x"


def test_shipped_recipe_of_a_thousand_adapters_is_read_within_seconds() -> None:
    started = time.process_time()
    assert len(load_config(["recipe=thousand"]).tasks) == 342
    assert time.process_time() - started < 5
