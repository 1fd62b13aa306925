"""YAML is read in linear time; bombs, tags and mappings that would lose a key are refused with their line."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.load import load_config, load_saved, save_config, validate
from flora_train.config.yaml_reader import YamlFaults, read
from flora_train.config.yaml_writer import write
from tests.unit.config.helpers import SMALL, loading_faults, refusal

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "\n".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}" for i in range(1, 9)
)


def within_a_second(action: Callable[[], Any]) -> Any:
    started = time.process_time()
    found = action()
    assert time.process_time() - started < 1
    return found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (BOMB, "mine.yaml:6 = '*a4': aliases stand for more than 1,000,000 values"),
        (MERGE_BOMB, "aliases stand for more than 1,000,000 values"),
        ("name: x\nx: &x [*x]\n", "mine.yaml:2 = '*x': refers to itself"),
        ("x: &x {y: {z: *x}}\n", "mine.yaml:1 = '*x': refers to itself"),
        ("<<: &x {a: *x}\n", "refers to itself"),
        ("a: *nothing\n", "mine.yaml:1 = '*nothing': is an alias without an anchor"),
        ("a: " + "[" * 100_000, "mine.yaml:1: is nested more than 64 levels deep"),
        ("{a: " * 100_000, "is nested more than 64 levels deep"),
        ("- " * 100_000, "is nested more than 64 levels deep"),
        ("\n".join(f"{' ' * i}a:" for i in range(2000)), "is nested more than 64 levels deep"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
            "is nested more than 64 levels deep",
        ),
        ("a: 1\nb: 2\na: 3\n", "mine.yaml:3 = 'a': this key is given twice (first on line 1)"),
        ("a: {b: 1, b: 2}\n", "mine.yaml:1 = 'b': this key is given twice"),
        ("a: 1\n'a': 2\n", "mine.yaml:2 = 'a': this key is given twice"),
        ("1: x\n", "mine.yaml:1 = '1': YAML reads this key as int, not as text"),
        ("~: x\n", "YAML reads this key as null"),
        ("? [a, b]\n: x\n", "mine.yaml:1: YAML reads this key as seq"),
        ("a: !!python/object/apply:os.system [ls]\n", "not the tag !!python/object/apply:os.system (line 1)"),
        ("a: !!binary aGk=\n", "not the tag !!binary (line 1)"),
        ("a: !!set {x}\n", "not the tag !!set (line 1)"),
        ("a: !!int x\n", "mine.yaml:1 = 'x': is not a valid int"),
        ("a: " + "9" * 10_000, "is not a valid int"),
        ("a: {<<: 5}\n", "mine.yaml:1 = '<<': merges keys: give it a mapping"),
        ("a: 1\n\tb: 2\n", "tab character"),
        ('a: "x\\0y"\n', "mine.yaml:1: contains a null character"),
        ("", "must hold keys and values"),
        ("# nothing\n", "must hold keys and values"),
        ("a: 1\n---\na: 2\n", "a second document begins here (line 2)"),
    ],
)
def test_invalid_yaml_is_one_error_within_a_second(
    tmp_path: Path, monkeypatch: Any, text: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text, encoding="utf-8")
    (found,) = within_a_second(lambda: loading_faults("recipe=mine.yaml"))
    assert line in found
    assert found.startswith("mine.yaml")


@pytest.mark.parametrize(
    "word",
    [
        "tasks={a: &x [*x]}",
        "adapters.lora={lr: &a [&b [*a]]}",
        "name=" + "[" * 5000,
        "tasks={a: 1, a: 2}",
        "seed=!!binary aGk=",
    ],
)
def test_bombs_on_the_command_line_are_one_error_that_names_the_key(word: str) -> None:
    (problem,) = within_a_second(lambda: refusal(lambda: load_config(["recipe=quickstart", word])))
    assert problem.key == word.partition("=")[0]


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("folder", "is a folder without a config.yaml"),
        ("/dev/zero", "is not a regular file"),
        ("/dev/null/x", "no such file"),
        ("x" * 5000, "no recipe of that name"),
        ("~nobody-here/x.yaml", "no such file"),
    ],
)
def test_recipe_that_is_not_a_file_is_one_error(
    tmp_path: Path, monkeypatch: Any, kind: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    (found,) = within_a_second(lambda: loading_faults(f"recipe={kind}"))
    assert line in found


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_recipe_in_another_encoding_says_so(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: é\n".encode(encoding))
    (found,) = loading_faults(f"recipe={path}")
    assert found == f"{path}: is not readable YAML: it is not UTF-8 text; save it as UTF-8"


def test_byte_order_mark_is_not_part_of_the_first_key() -> None:
    assert read("\ufeffname: x\n") == {"name": "x"}


def test_merge_keys_and_aliases_mean_what_yaml_says() -> None:
    text = "x: &x {p: 1, q: 2}\ny: {<<: *x, q: 3}\nz: {<<: [{q: 5}, *x]}\nw: *x\n"
    assert read(text) == {
        "x": {"p": 1, "q": 2},
        "y": {"p": 1, "q": 3},
        "z": {"p": 1, "q": 5},
        "w": {"p": 1, "q": 2},
    }


def test_numbers_without_a_point_and_dates_are_read_as_their_writer_meant() -> None:
    found = read("a: 1e-3\nb: 2026-01-01\nc: =\nd: no\ne: 0x1F\nf: .5e3\n")
    assert found == {"a": 1e-3, "b": "2026-01-01", "c": "=", "d": False, "e": 31, "f": 500.0}


TEXTS = [
    "no",
    "~",
    "1e-3",
    "2026-01-01",
    "<<",
    "=",
    "- a",
    "a: b",
    "\n x",
    "é\x85\u2028\ufeff🙂",
    "0x1F",
    "",
    " ",
    "{",
    "'\"\\",
    "#",
    "y",
]


def test_written_yaml_round_trips() -> None:
    value = {"texts": TEXTS, **dict.fromkeys(TEXTS), "deep": [{"a": [[], {}]}, 1e-12, 10**30, True, None]}
    assert read(write(value)) == value


def test_damaged_text_has_all_its_faults_in_one_error() -> None:
    with pytest.raises(YamlFaults) as caught:
        read("a: 1\na: 2\nno: 3\nb: !!set {}\n")
    assert [fault.line for fault in caught.value.faults] == [2, 3, 4]


@pytest.mark.parametrize(("tasks", "families"), [(5000, 5000), (156, 3), (1, 230)])
def test_saved_configuration_of_thousands_is_read_back_equal(
    tmp_path: Path, tasks: int, families: int
) -> None:
    adapters = {f"a{i}": {"method": "lora", "lr": 1e-3, "tasks": [f"t{i % tasks}"]} for i in range(families)}
    config = validate(
        {**SMALL, "tasks": {f"t{i}": {"train": f"{i}.jsonl"} for i in range(tasks)}, "adapters": adapters}
    )
    path = tmp_path / "config.yaml"
    started = time.process_time()
    save_config(config, path)
    assert load_saved(path) == config
    assert time.process_time() - started < 20  # 3 on a machine that does nothing else
    if tasks < 5000:
        assert load_config([f"recipe={path}"]) == config


def test_saved_configuration_in_a_folder_with_any_name_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "a: [b] #${x}"
    folder.mkdir()
    save_config(validate(SMALL), folder / "config.yaml")
    assert load_saved(folder / "config.yaml") == validate(SMALL)


def test_saved_configuration_that_is_damaged_names_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nname: y\n")
    assert [problem.key for problem in refusal(lambda: load_saved(path))] == [f"{path}:2"]
    path.write_text("nam: x\n")
    assert all(problem.key.startswith(f"{path}: ") for problem in refusal(lambda: load_saved(path)))
