"""split_by makes one task for each value of a column; split_seed chooses rows independently of seed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.load import load_config, save_config, validate
from flora_train.config.schema import RunConfig
from flora_train.data import split_by
from flora_train.data.split_by import expand_split_tasks
from flora_train.data.task import load_tasks
from tests.unit.config.helpers import refusal
from tests.unit.data.conftest import run_config
from tests.unit.data.test_task import same, texts

LANGUAGES = ["cs", "de", "Português (BR)"]
ROWS = [{"text": f"text {i} in {LANGUAGES[i % 3]}", "lang": LANGUAGES[i % 3]} for i in range(60)]
NAMES = ["support_Portugues_BR", "support_cs", "support_de"]


def expanded(**task: Any) -> RunConfig:
    return expand_split_tasks(run_config({"support": {"split_by": "lang", **task}}))


def test_every_value_becomes_a_task_that_inherits_all_other_keys(write) -> None:
    write("a.jsonl", ROWS)
    config = expanded(train="a.jsonl", weight=3, validation_fraction=0.2, license="mit")
    assert list(config.tasks) == NAMES
    for task in config.tasks.values():
        assert (task.weight, task.validation_fraction, task.license, task.split_by) == (3, 0.2, "mit", "lang")
    assert [task.split_value for task in config.tasks.values()] == ["Português (BR)", "cs", "de"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_rows_of_a_task_are_those_of_its_value(kind: str, write, tokenizer: Any, tmp_path: Path) -> None:
    path = write(f"a.{kind}", ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            table.writerows([["text", "lang"], *([row["text"], row["lang"]] for row in ROWS)])
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(ROWS), path)
    config = expanded(train=f"a.{kind}", validation_fraction=0.25)
    tasks = load_tasks(config, tokenizer, tmp_path / "cache")
    assert list(tasks) == NAMES
    for name, language in zip(NAMES, ["Português (BR)", "cs", "de"], strict=True):
        train, held = texts(tasks[name].train, tokenizer), texts(tasks[name].validation, tokenizer)
        assert (len(train), len(held)) == (15, 5)
        assert sorted(train + held) == sorted(row["text"] for row in ROWS if row["lang"] == language)


def test_folder_of_files_is_split_by_its_columns(write, tokenizer: Any, tmp_path: Path) -> None:
    for i in range(4):
        write(f"code/{i}.lua", f"text {i % 2}")
    config = expanded(train={"folder": "code"}, split_by="text")
    assert list(config.tasks) == ["support_text_0", "support_text_1"]
    assert all(len(task.train) == 1 for task in load_tasks(config, tokenizer, tmp_path / "cache").values())


def test_hub_data_set_is_split_and_read_once(
    write, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    write("set/train.jsonl", ROWS)
    read: list[str] = []
    load_dataset = datasets.load_dataset

    def counted(name: str, *words: Any, **options: Any) -> Any:
        read.append(name)
        return load_dataset(name, *words, **options)

    monkeypatch.setattr(datasets, "load_dataset", counted)
    config = expanded(train={"hub": str(tmp_path / "set")})
    tasks = load_tasks(config, tokenizer, tmp_path / "cache")
    assert list(tasks) == NAMES
    assert len(read) == 1


def test_validation_rows_are_split_alike(write, tokenizer: Any, tmp_path: Path) -> None:
    write("a.jsonl", ROWS)
    write("b.jsonl", [*ROWS[:6], {"text": "other", "lang": "fi"}])
    tasks = load_tasks(expanded(train="a.jsonl", validation="b.jsonl"), tokenizer, tmp_path / "cache")
    assert [len(task.validation) for task in tasks.values()] == [2, 2, 2]
    write("b.jsonl", ROWS[:2])
    (problem,) = refusal(lambda: expanded(train="a.jsonl", validation="b.jsonl"))
    assert str(problem).startswith(
        "tasks.support.split_by = 'lang': has the value 'Português (BR)' in train and not in validation"
    )


def test_adapters_name_the_made_tasks_or_all_of_them(write) -> None:
    write("a.jsonl", ROWS)
    raw = run_config(
        {"support": {"train": "a.jsonl", "split_by": "lang"}, "other": {"train": "a.jsonl"}}
    ).model_dump(mode="json")
    ia3 = {"method": "ia3", "lr": 1e-3}
    adapters = {
        "all": ia3,
        "one": {**ia3, "tasks": ["support_cs"]},
        "three": {**ia3, "tasks": ["support", "support_de"]},
    }
    config = expand_split_tasks(validate({**raw, "adapters": adapters}))
    assert config.adapters["all"].tasks is None
    assert config.adapters["one"].tasks == ["support_cs"]
    assert config.adapters["three"].tasks == NAMES
    adapters["one"]["tasks"] = ["support_cz"]
    (problem,) = refusal(lambda: expand_split_tasks(validate({**raw, "adapters": adapters})))
    assert problem.key == "adapters.one.tasks"
    assert problem.hint.endswith("Did you mean 'support_cs'?")


def test_saved_configuration_lists_the_tasks_and_is_the_same_when_read(write, tmp_path: Path) -> None:
    write("a.jsonl", ROWS)
    config = expanded(train="a.jsonl")
    save_config(config, tmp_path / "config.yaml")
    read = load_config([f"recipe={tmp_path / 'config.yaml'}"])
    assert read == config
    assert expand_split_tasks(read) == config


def test_value_stands_in_languages(write) -> None:
    write("a.jsonl", [{"text": f"{i}", "lang": ["lua", "perl"][i % 2]} for i in range(8)])
    config = expanded(train="a.jsonl", language="{value}")
    assert [task.language for task in config.tasks.values()] == ["lua", "pl"]


def names_of(values: list[Any], write) -> list[str]:
    write("a.jsonl", [{"text": "a", "lang": value} for value in values for _ in range(2)])
    return [name.removeprefix("support_") for name in expanded(train="a.jsonl").tasks]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["C", "C#", "C++"], ["C", "Csharp", "Cpp"]),
        ([1, 0, 2.5], ["0", "1", "2_5"]),
        ([True, False], ["False", "True"]),
        (["pt-BR", " cs "], ["cs", "pt-BR"]),
        (["a/../b", "x" * 64], ["a_b", "x" * 64]),
    ],
)
def test_names_are_made_of_letters_and_digits(values: list[Any], names: list[str], write) -> None:
    assert names_of(values, write) == names


@pytest.mark.parametrize(
    "values", [["a b", "a_b", "A!B"], ["中文", "日本語"], ["x" * 300, "x" * 301], ["-", "--", "..", "../.."]]
)
def test_values_that_would_have_one_name_get_names_of_their_own(values: list[str], write) -> None:
    names = names_of(values, write)
    assert len({name.lower() for name in names}) == len(values)
    assert all(re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) for name in names)


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        (
            [{"text": "a", "language": "cs"}] * 4,
            r"is not a column with values in the train rows; they have language or text\. Did you mean",
        ),
        (
            [{"text": "a", "lang": "cs"}, {"text": "a"}, {"text": "a", "lang": ""}],
            "is empty in 2 of 3 train rows",
        ),
        ([{"text": "a", "lang": ["cs"]}] * 4, "row 1 of train holds a list"),
        (
            [{"text": "a", "lang": f"{i}"} for i in range(5)],
            r"has 5 value\(s\) with one row, '0' for example",
        ),
        ([{"text": "a", "lang": f"{i // 2}"} for i in range(10)], "has 5 different values.* at most 4"),
    ],
)
def test_column_that_makes_no_tasks_is_refused(
    rows: list[Any], hint: str, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_by, "MOST_TASKS", 4 if "at most 4" in hint else 100)
    write("a.jsonl", rows)
    (problem,) = refusal(lambda: expanded(train="a.jsonl"))
    assert problem.key == "tasks.support.split_by"
    assert re.search(hint, problem.hint)


def test_made_name_that_another_task_has_is_refused(write) -> None:
    write("a.jsonl", ROWS)
    tasks = {"support": {"train": "a.jsonl", "split_by": "lang"}, "support_cs": {"train": "a.jsonl"}}
    (problem,) = refusal(lambda: expand_split_tasks(run_config(tasks)))
    assert "makes the task support_cs" in problem.hint


def test_value_given_by_hand_selects_rows_and_must_exist(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS)
    task = load(tokenizer, cs={"train": "a.jsonl", "split_by": "lang", "split_value": "cs"})["cs"]
    assert len(task.train) + len(task.validation) == 20
    (problem,) = refusal(
        lambda: load(tokenizer, fi={"train": "a.jsonl", "split_by": "lang", "split_value": "fi"})
    )
    assert str(problem).startswith(
        "tasks.fi.split_value = 'fi': is in no row of tasks.fi.train; values of lang are Portug"
    )
    (problem,) = refusal(lambda: load(tokenizer, fi={"train": "a.jsonl", "split_value": "fi"}))
    assert problem.key == "tasks.fi.split_value"


def test_split_seed_chooses_rows_independently_of_seed(write, load, tokenizer: Any) -> None:
    write("a.jsonl", ROWS)
    task = {"train": "a.jsonl", "max_examples": 20, "max_validation_examples": 5, "validation_fraction": 0.4}
    first = load(tokenizer, a={**task, "split_seed": 0})["a"]
    other_seed = load(tokenizer, seed=1, a={**task, "split_seed": 0})["a"]
    assert same(first.train, other_seed.train)
    assert same(first.validation, other_seed.validation)
    assert same(first.train, load(tokenizer, a=task)["a"].train), "the default is seed"
    other_split = load(tokenizer, a={**task, "split_seed": 1})["a"]
    assert not same(first.train, other_split.train)
    assert not same(first.validation, other_split.validation)
