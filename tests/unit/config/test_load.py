"""Recipe, data config and command line become one configuration, and a saved one becomes it again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.config.json_format import read_object
from flora_train.config.load import PROJECT_ROOT, load_config, save_config, shipped, validate
from flora_train.config.paths import read_yaml
from tests.unit.config.helpers import SMALL, loading_faults, small

RECIPE = """
name: mine
model: {path: m}
adapters:
  lora: {method: lora, lr: 1e-3}
training: {steps: 10}
"""
TASKS = "tasks:\n  lua: {train: lua.jsonl}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_recipe_is_found_by_shipped_name_path_and_run_folder(write) -> None:
    write("recipes/here.yaml", RECIPE + TASKS)
    write("recipes/deeper/there.yaml", RECIPE + TASKS)
    write("outputs/run/config.yaml", RECIPE + TASKS)
    names = (
        "here",
        "deeper/there",
        "recipes/here.yaml",
        "./recipes/here.yaml",
        "outputs/run",
        "outputs/run/config.yaml",
    )
    configs = [load_config([f"recipe={name}"]) for name in names]
    assert all(config == configs[0] for config in configs)


def test_shipped_recipe_is_found_by_path_from_any_folder(write) -> None:
    assert load_config(["recipe=recipes/quickstart.yaml"]) == load_config(["recipe=quickstart"])


def test_unknown_recipe_or_data_config_is_suggested(write) -> None:
    (line,) = loading_faults("recipe=quikstart")
    assert line.startswith("recipe = 'quikstart': no recipe of that name in recipes/; there are ")
    assert line.endswith("Did you mean 'quickstart'?")
    write("mine.yaml", "name: mine")
    (line,) = loading_faults("recipe=mine")
    assert line == "recipe = 'mine': no recipe of that name in recipes/. There is a file: recipe=mine.yaml"
    (line,) = loading_faults("recipe=recipes/quikstart.yaml")
    assert line == "recipe = 'recipes/quikstart.yaml': no such file. Did you mean 'quickstart'?"
    (line,) = loading_faults("recipe=quickstart", "data_config=quickstat")
    assert line.startswith("data_config = 'quickstat': no data_config of that name")
    assert line.endswith("Did you mean 'quickstart'?")


@pytest.mark.parametrize("words", [[], ["recipe="], ["training.steps=3"]])
def test_missing_recipe_lists_what_there_is(words: list[str]) -> None:
    (line,) = loading_faults(*words)
    assert line.startswith("recipe: is required: recipe=NAME")
    assert "quickstart" in line


def test_command_line_beats_recipe_beats_data_config_beats_task_defaults(write) -> None:
    write("data_configs/some.yaml", "task_defaults: {weight: 1, max_examples: 1, text: a, truncation: drop}\n"
          "tasks:\n  lua: {train: x, max_examples: 2, text: b, truncation: split}\n")  # fmt: skip
    write("mine.yaml", RECIPE + "data_config: some\ntasks: {lua: {text: c, truncation: truncate}}\n")
    lua = load_config(["recipe=mine.yaml", "tasks.lua.truncation=drop"]).tasks["lua"]
    assert (lua.weight, lua.max_examples, lua.text, lua.truncation) == (1, 2, "c", "drop")


def test_data_config_of_the_command_line_replaces_the_recipes(write) -> None:
    write("one.yaml", TASKS)
    write("two.yaml", TASKS.replace("lua", "perl"))
    write("mine.yaml", RECIPE + "data_config: one.yaml\n")
    assert list(load_config(["recipe=mine.yaml"]).tasks) == ["lua"]
    assert list(load_config(["recipe=mine.yaml", "data_config=two.yaml"]).tasks) == ["perl"]


def test_task_can_be_changed_and_added_on_the_command_line(write) -> None:
    write("mine.yaml", RECIPE + TASKS + "task_defaults: {truncation: drop}\n")
    tasks = load_config(["recipe=mine.yaml", "tasks.lua.weight=2", "tasks.perl.train=perl.jsonl"]).tasks
    assert tasks["lua"].weight == 2
    assert tasks["perl"].train.files == ["perl.jsonl"]
    assert tasks["perl"].truncation == "drop"


def test_adapters_and_tasks_are_left_out_by_null_though_others_refer_to_them(write) -> None:
    lua = "tasks: {lua: {train: x.jsonl, text: c}, perl: {train: '${tasks.lua.train}', text: c}}\n"
    write("mine.yaml", RECIPE + lua)
    config = load_config(["recipe=mine.yaml", "adapters.b={method: ia3, lr: 1e-3}"])
    first = next(iter(config.adapters))
    words = [
        "recipe=mine.yaml",
        "adapters.b={method: ia3, lr: 1e-3}",
        "tasks.lua=null",
        f"adapters.{first}=null",
    ]
    config = load_config(words)
    assert list(config.adapters) == ["b"]
    assert list(config.tasks) == ["perl"]
    assert config.tasks["perl"].train.files == ["x.jsonl"]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("tasks.lau=null", "tasks.lau: there is none to leave out; there are lua. Did you mean 'lua'?"),
        ("tasks.lua=null", "tasks = {}: must have at least 1 item(s)"),
    ],
)
def test_what_cannot_be_left_out_is_an_error(write, word: str, line: str) -> None:
    write("mine.yaml", RECIPE + TASKS)
    with pytest.raises(UserError) as raised:
        load_config(["recipe=mine.yaml", word])
    assert line in str(raised.value)


def test_fault_of_task_defaults_is_reported_once_and_there(write) -> None:
    write("mine.yaml", RECIPE + "task_defaults: {over_lnog: drop, weight: -1}\n"
          "tasks: {a: {train: x}, b: {train: x}, c: {train: x, weight: -2}}\n")  # fmt: skip
    lines = loading_faults("recipe=mine.yaml")
    assert [line.split(":")[0] for line in lines] == [
        "task_defaults.weight = -1",
        "task_defaults.over_lnog",
        "tasks.c.weight = -2",
    ]
    assert loading_faults("recipe=mine.yaml", "task_defaults=5") == [
        "task_defaults = 5: must hold keys, as every task does"
    ]


def test_two_tasks_of_one_name_in_a_file_are_an_error_that_names_file_and_line(write) -> None:
    path = write("mine.yaml", RECIPE + TASKS + "  perl: {train: y}\n  lua: {train: z}\n")
    line_number = path.read_text().splitlines().index("  lua: {train: z}") + 1
    (line,) = loading_faults("recipe=mine.yaml")
    assert line.startswith(
        f"mine.yaml:{line_number} = 'lua': this key is given twice (first on line {line_number - 2})"
    )


def test_two_adapters_of_one_name_in_flow_style_are_an_error(write) -> None:
    write("mine.yaml", RECIPE.replace("lora:", "lora: {method: ia3, lr: 1}\n  lora:") + TASKS)
    (line,) = loading_faults("recipe=mine.yaml")
    assert "'lora': this key is given twice" in line


def test_name_that_yaml_does_not_read_as_text_is_an_error(write) -> None:
    write("mine.yaml", RECIPE + "tasks:\n  no: {train: norwegian.jsonl}\n")
    (line,) = loading_faults("recipe=mine.yaml")
    assert line.startswith("mine.yaml:8 = 'no': YAML reads this key as bool")
    write("mine.yaml", RECIPE + "tasks:\n  'no': {train: norwegian.jsonl}\n")
    assert list(load_config(["recipe=mine.yaml"]).tasks) == ["no"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1\nb: 2\n", "is not readable YAML"),
        ("- a\n", "must hold keys and values"),
        ("5\n", "must hold keys and values"),
        ("a: 1\n---\nb: 2\n", "is not readable YAML"),
        ("a: !!python/object:os.system x\n", "is not readable YAML"),
    ],
)
def test_damaged_yaml_names_the_file(write, text: str, reason: str) -> None:
    write("mine.yaml", text)
    (line,) = loading_faults("recipe=mine.yaml")
    assert line.startswith("mine.yaml: ")
    assert reason in line


def test_file_that_is_not_utf8_names_the_file(write) -> None:
    write("mine.yaml", "").write_bytes(b"name: \xff\xfe\n")
    (line,) = loading_faults("recipe=mine.yaml")
    assert line.startswith("mine.yaml: is not readable YAML")


def test_interpolation_follows_the_command_line(write) -> None:
    write("mine.yaml", RECIPE + TASKS + "evaluation: {interval: '${training.steps}'}\n")
    assert load_config(["recipe=mine.yaml", "training.steps=7"]).evaluation.interval == 7


def test_interpolation_of_an_unknown_key_is_an_error_with_the_way_to_write_it_literally(write) -> None:
    write("mine.yaml", RECIPE + "tasks: {sh: {train: x, sample_prompts: ['echo ${HOME}']}}\n")
    (line,) = loading_faults("recipe=mine.yaml")
    assert "HOME" in line
    assert "\\${" in line
    write("mine.yaml", RECIPE + "tasks: {sh: {train: x, sample_prompts: ['echo \\${HOME}']}}\n")
    assert load_config(["recipe=mine.yaml"]).tasks["sh"].sample_prompts == ["echo ${HOME}"]


TRICKY = [
    "${x}",
    "\\${x}",
    "\\\\${x} \\${y}\\",
    "${",
    "\n  two\nlines ",
    "1e-3",
    "no",
    "~",
    "# no comment",
    "{a: b}",
    "日本\u2028語🙂",
    "'\"",
]


def test_saved_configuration_reloads_equal_whatever_its_texts(tmp_path: Path) -> None:
    raw = small(
        tasks__lua__sample_prompts=TRICKY,
        tasks__lua__text="{code}",
        output_dir=str(tmp_path / "x"),
        training__eps=1e-12,
    )
    raw["adapters"]["flora"] = {
        "method": "flora",
        "lr": 0.1,
        "target_modules": ["q_proj"],
        "max_grad_norm": None,
        "tasks": ["lua"],
    }
    raw["tasks"]["perl"]["train"] = {"hub": "a/b", "subset": "c"}
    config = validate(raw)
    save_config(config, tmp_path / "config.yaml")
    assert load_config([f"recipe={tmp_path / 'config.yaml'}"]) == config
    assert load_config([f"recipe={tmp_path}"]) == config


def test_saved_configuration_does_not_depend_on_the_files_it_came_from(write, tmp_path: Path) -> None:
    write("data.yaml", TASKS + "task_defaults: {weight: 3}\n")
    write("mine.yaml", RECIPE + "data_config: data.yaml\n")
    config = load_config(["recipe=mine.yaml", "seed=5"])
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "data.yaml").unlink()
    assert load_config(["recipe=config.yaml"]) == config


def test_home_folder_is_understood_in_the_output_folder() -> None:
    assert validate({**SMALL, "output_dir": "~/runs"}).folder == str(Path.home() / "runs")


RECIPES = sorted((PROJECT_ROOT / "recipes").rglob("*.yaml"))
DATA_CONFIGS = sorted((PROJECT_ROOT / "data_configs").rglob("*.yaml"))


def test_there_are_recipes_and_data_configs_and_all_have_a_name() -> None:
    for files, kind in ((RECIPES, "recipes"), (DATA_CONFIGS, "data_configs")):
        assert files
        assert set(files) <= {path.resolve() for path in shipped(kind).values()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_says_in_its_first_line_what_it_is(path: Path) -> None:
    config = load_config([f"recipe={path}"])
    assert config.tasks
    assert config.adapters
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize("path", DATA_CONFIGS, ids=lambda path: path.stem)
def test_shipped_data_config_loads(path: Path, write) -> None:
    write("mine.yaml", RECIPE)
    assert load_config(["recipe=mine.yaml", f"data_config={path}"]).tasks


def test_a_pipe_in_the_place_of_a_file_is_an_error_and_no_wait(tmp_path: Path) -> None:
    for name in ("config.yaml", "run.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"config\.yaml: is not a regular file"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"run\.json: is not a regular file: put it back"):
        read_object(tmp_path / "run.json", "put it back")
