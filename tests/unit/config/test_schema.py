"""Wrong values are reported with their key, the value and a hint, all of them at once."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import load_config, validate
from tests.unit.config.helpers import SMALL, faults, refusal, small


def test_small_recipe_is_valid_so_that_every_fault_below_is_the_named_one() -> None:
    config = validate(SMALL)
    assert list(config.tasks) == ["lua", "perl"]
    assert config.folder == "outputs/small"


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("trainning", "training"),
        ("training__stepz", "steps"),
        ("adapters__lora__rnak", "rank"),
        ("tasks__lua__wieght", "weight"),
        ("model__pathh", "path"),
        ("mixture__strateggy", "strategy"),
        ("evaluation__intervl", "interval"),
        ("tracking__projct", "project"),
    ],
)
def test_unknown_key_is_an_error_with_a_suggestion_in_every_section(key: str, suggestion: str) -> None:
    dotted = key.replace("__", ".")
    line = faults(**{key: 1})[dotted]
    section = dotted.rpartition(".")[0]
    assert line.startswith(f"{dotted}: unknown key; the keys here are ")
    assert line.endswith(f"Did you mean {'.'.join(filter(None, [section, suggestion]))!r}?")


def test_unknown_key_in_a_source_is_suggested_too() -> None:
    line = faults(tasks__lua__train={"fils": "a.jsonl", "hub": "x"})["tasks.lua.train.fils"]
    assert line.endswith("Did you mean 'tasks.lua.train.files'?")


def test_outermost_key_that_belongs_to_a_section_is_suggested_with_its_section() -> None:
    assert faults(steps=3)["steps"].endswith("Did you mean 'training.steps'?")


def test_errors_of_all_sections_are_reported_together_with_key_value_and_hint() -> None:
    found = faults(
        name="not a name",
        seed=-1,
        tasks__lua__weight=0,
        tasks__perl__text="code",
        tasks__perl__prompt="doc",
        adapters__lora={
            "method": "lorra",
            "rank": -3,
            "target_modules": 3,
            "tasks": ["lau"],
            "warmup_steps": 10,
        },
        adapters__ia3__rank=8,
        mixture__temperature=2,
        training__steps=10,
        training__max_length=4096,
        training__log_every="abc",
        tracking__trackers=["wandbb"],
        typo=1,
    )
    expected = {
        "name": ("'not a name'", "letters, digits"),
        "seed": ("-1", "at least 0"),
        "tasks.lua.weight": ("0", "more than 0"),
        "tasks.perl.completion": ("", "prompt and completion belong together"),
        "tasks.perl.text": ("'code'", "not both"),
        "adapters.lora.method": ("'lorra'", "lora, meteora, mixlora or switch. Did you mean 'lora'?"),
        "adapters.lora.rank": ("-3", "at least 1"),
        "adapters.lora.lr": ("", "is required"),
        "adapters.lora.target_modules": ("3", "must be a list, or must be all-linear, default or query-key"),
        "adapters.lora.tasks": ("'lau'", "Did you mean 'lua'?"),
        "adapters.lora.warmup_steps": ("10", "training.steps = 10"),
        "adapters.ia3.rank": ("8", "no meaning for method ia3"),
        "mixture.temperature": ("2", "strategy=temperature"),
        "training.max_length": ("4096", "tokens_per_microbatch = 2048"),
        "training.log_every": ("'abc'", "whole number"),
        "tracking.trackers.0": ("'wandbb'", "Did you mean 'wandb'?"),
        "typo": ("", "unknown key"),
    }
    assert found.keys() == expected.keys()
    for key, (value, hint) in expected.items():
        assert found[key].startswith(f"{key} = {value}: " if value else f"{key}: "), found[key]
        assert hint in found[key]
        assert "\n" not in found[key]


@pytest.mark.parametrize(
    ("changes", "key", "hint"),
    [
        (
            {"adapters__ia3__rank": 4},
            "adapters.ia3.rank",
            "it belongs to flora, lora, dora, mixlora and switch: remove it",
        ),
        ({"adapters__ia3__dropout": 0.1}, "adapters.ia3.dropout", "it belongs to lora"),
        ({"adapters__lora__variant": "pure"}, "adapters.lora.variant", "it belongs to flora"),
        (
            {"adapters__lora__feedforward_modules": ["x"]},
            "adapters.lora.feedforward_modules",
            "it belongs to ia3",
        ),
        ({"mixture__temperature": 2.0}, "mixture.temperature", "give both or neither"),
        ({"mixture__strategy": "temperature"}, "mixture.temperature", "give both or neither"),
        (
            {"adapters__lora__warmup_steps": 10},
            "adapters.lora.warmup_steps",
            "smaller than training.steps = 10",
        ),
        (
            {"adapters__lora__warmup_steps": 5, "adapters__lora__max_steps": 5},
            "adapters.lora.warmup_steps",
            "smaller than max_steps = 5",
        ),
        (
            {"adapters__lora__warmup_steps": 50, "adapters__lora__max_steps": 5},
            "adapters.lora.warmup_steps",
            "smaller than max_steps = 5",
        ),
        ({"training__max_length": 2049}, "training.max_length", "tokens_per_microbatch = 2048"),
        ({"training__tokens_per_microbatch": 256}, "training.max_length", "tokens_per_microbatch = 256"),
        ({"training__tokens_per_step": 256}, "training.max_length", "tokens_per_step = 256"),
        (
            {"tasks__lua__text": "a", "tasks__lua__prompt": "b", "tasks__lua__completion": "c"},
            "tasks.lua.text",
            "not both",
        ),
        ({"tasks__lua__prompt": "b"}, "tasks.lua.completion", "belong together"),
        ({"tasks__lua__completion": "b"}, "tasks.lua.completion", "belong together"),
        ({"tasks__lua__train": {"hub": "a", "files": "b"}}, "tasks.lua.train.folder", "not files and hub"),
        ({"tasks__lua__train": {"split": "a"}}, "tasks.lua.train.folder", "not none"),
    ],
)
def test_values_that_contradict_each_other_are_refused_once(
    changes: dict[str, Any], key: str, hint: str
) -> None:
    found = faults(**changes)
    assert found.keys() == {key}
    assert hint in found[key]


@pytest.mark.parametrize(
    ("changes", "key", "hint"),
    [
        ({"adapters__lora__rank": 0}, "adapters.lora.rank = 0", "at least 1"),
        ({"adapters__lora__rank": -2}, "adapters.lora.rank = -2", "at least 1"),
        ({"adapters__lora__rank": 2.5}, "adapters.lora.rank = 2.5", "whole number"),
        ({"adapters__lora__lr": 0}, "adapters.lora.lr = 0", "more than 0"),
        ({"adapters__lora__lr": float("inf")}, "adapters.lora.lr = inf", "finite"),
        ({"adapters__lora__lr": "fast"}, "adapters.lora.lr = 'fast'", "a number"),
        ({"adapters__lora__tasks": []}, "adapters.lora.tasks = []", "at least 1"),
        ({"adapters__lora__target_modules": []}, "adapters.lora.target_modules = []", "at least 1"),
        ({"adapters__lora__target_parameters": []}, "adapters.lora.target_parameters = []", "at least 1"),
        (
            {"adapters__lora__target_parameters": ["w"], "adapters__lora__method": "dora"},
            "adapters.lora.target_parameters = ['w']",
            "no meaning for method dora; it belongs to flora, lora and ia3",
        ),
        (
            {"adapters__lora__target_parameters": ["w"], "adapters__lora__dropout": 0.5},
            "adapters.lora.target_parameters = ['w']",
            "cannot be combined with dropout = 0.5",
        ),
        (
            {"adapters__lora__target_parameters": ["w"], "adapters__lora__init_from": "outputs/a"},
            "adapters.lora.init_from = 'outputs/a'",
            "cannot be combined with target_parameters",
        ),
        (
            {"adapters__lora__target_modules": "all_linear"},
            "adapters.lora.target_modules = 'all_linear'",
            "'all-linear'?",
        ),
        (
            {"adapters__lora__target_modules": "query_key"},
            "adapters.lora.target_modules = 'query_key'",
            "'query-key'?",
        ),
        ({"training__steps": "abc"}, "training.steps = 'abc'", "whole number"),
        ({"training__steps": True}, "training.steps = True", "true or false"),
        ({"training__steps": None}, "training.steps", "whole number"),
        ({"training__betas": [0.9]}, "training.betas.1", "required"),
        ({"training__betas": 0.9}, "training.betas = 0.9", "list"),
        ({"tracking__online": "maybe"}, "tracking.online = 'maybe'", "true or false"),
        ({"tasks__lua__truncation": "splt"}, "tasks.lua.truncation = 'splt'", "Did you mean 'split'?"),
        ({"tasks__lua__validation_fraction": 1}, "tasks.lua.validation_fraction = 1", "less than 1"),
        ({"tasks__lua__text": ["a"]}, "tasks.lua.text = ['a']", "text"),
        ({"tasks__lua__train": 5}, "tasks.lua.train = 5", "must hold keys: hub"),
        ({"tasks": None}, "tasks", "must hold names"),
        ({"tasks": {}}, "tasks = {}", "at least 1"),
        ({"tasks": {"a.b": {"train": "x"}}}, "tasks.a.b", "letters, digits"),
        ({"tasks": {"__base__": {"train": "x"}}}, "tasks.__base__", "letters, digits"),
        ({"adapters": ["lora"]}, "adapters = ['lora']", "must hold names"),
        ({"tasks__lua": 5}, "tasks.lua = 5", "must hold keys: train"),
        ({"model": "gpt2"}, "model = 'gpt2'", "must hold keys: path"),
        ({"model__path": ""}, "model.path = ''", "not be empty"),
    ],
)
def test_wrong_type_or_value_out_of_range_names_key_value_and_fix(
    changes: dict[str, Any], key: str, hint: str
) -> None:
    found = faults(**changes)
    assert len(found) == 1
    line = next(iter(found.values()))
    assert line.startswith(f"{key}: ")
    assert hint in line


def test_empty_section_is_a_section_without_keys() -> None:
    assert validate(small(mixture=None, evaluation=None)) == validate(SMALL)
    assert faults(training=None).keys() == {"training.steps"}
    assert faults(tasks__lua=None).keys() == {"tasks.lua.train"}


def test_long_value_is_cut_to_one_short_line() -> None:
    line = faults(training__steps="a\n" * 500)["training.steps"]
    assert len(line) < 150
    assert "\n" not in line


def test_adapter_names_that_collide_after_joining_are_refused() -> None:
    tasks = {"a": {"train": "x"}, "a-b": {"train": "x"}}
    adapters = {"b-c": {"method": "ia3", "lr": 1}, "c": {"method": "ia3", "lr": 1}}
    assert "'a-b-c'" in faults(tasks=tasks, adapters=adapters)["adapters"]
    adapters["c"]["tasks"] = ["a"]
    assert validate(small(tasks=tasks, adapters=adapters)).adapters["c"].tasks == ["a"]


def test_sections_are_compared_even_where_one_of_them_has_a_fault_elsewhere() -> None:
    found = faults(
        tasks__lua__weight=-1, adapters__ia3={"method": "ia3", "tasks": ["pearl"]}, training__eps=0
    )
    assert found.keys() == {"tasks.lua.weight", "adapters.ia3.lr", "adapters.ia3.tasks", "training.eps"}
    assert "Did you mean 'perl'?" in found["adapters.ia3.tasks"]


def test_sources_may_be_written_short() -> None:
    train = [
        validate(small(tasks__lua__train=short)).tasks["lua"].train for short in ("a", ["a"], {"files": "a"})
    ]
    assert train[0] == train[1] == train[2]
    assert train[0].files == ["a"]


def test_configuration_is_frozen() -> None:
    config = validate(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3


@pytest.mark.parametrize("name", ["base", "Base", "BASE"])
@pytest.mark.parametrize("section", ["tasks", "adapters"])
def test_name_of_the_base_in_reports_is_reserved(section: str, name: str) -> None:
    raw = small()
    raw[section][name] = raw[section].pop(next(iter(raw[section])))
    (problem,) = refusal(lambda: validate(raw))
    assert str(problem) == f"{section}.{name}: is what reports call the base model: rename it"


@pytest.mark.parametrize(
    ("tasks", "adapters", "named"),
    [
        (["lua", "Lua"], ["lora"], "Lua-lora and lua-lora"),
        (["lua"], ["lora", "LoRA"], "lua-LoRA and lua-lora"),
        (["a", "A-b"], ["B-c", "c"], "A-b-c and a-B-c"),
    ],
)
def test_adapters_whose_names_differ_in_capitals_only_are_refused(
    tasks: list[str], adapters: list[str], named: str
) -> None:
    raw = small()
    task, adapter = (next(iter(raw[section].values())) for section in ("tasks", "adapters"))
    raw["tasks"], raw["adapters"] = dict.fromkeys(tasks, task), dict.fromkeys(adapters, adapter)
    (problem,) = refusal(lambda: validate(raw))
    assert {str(problem.value), problem.hint.split()[1]} == set(named.split(" and "))
    assert "differ in case only" in problem.hint


def test_names_that_join_to_one_are_refused() -> None:
    raw = small()
    task, adapter = (next(iter(raw[section].values())) for section in ("tasks", "adapters"))
    raw["tasks"], raw["adapters"] = dict.fromkeys(["a", "a-b"], task), dict.fromkeys(["b-c", "c"], adapter)
    (problem,) = refusal(lambda: validate(raw))
    assert problem.value == "a-b-c"


def test_a_tag_that_yaml_reads_as_a_number_is_to_be_quoted() -> None:
    assert load_config(["recipe=quickstart", "model.revision='1.10'"]).model.revision == "1.10"
    with pytest.raises(UserError, match=r"model\.revision = 1\.1: is a number to YAML.*put it in quotes"):
        load_config(["recipe=quickstart", "model.revision=1.10"])
