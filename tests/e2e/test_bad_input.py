"""Wrong input ends with exit status 2 and one line per problem, before anything is written.

What needs a loaded model to be found (a target that matches nothing) is here too; a full disk is tested with
the run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from flora_train.cli import main
from flora_train.config.load import PROJECT_ROOT
from tests.forked import python
from tests.unit.data.conftest import byte_tokenizer

GOOD = [{"text": f"text {i}", "doc": "d"} for i in range(10)]
RECIPE = """
name: bad
model: {path: model}
tasks:
  lua: {train: lua.jsonl}
adapters:
  lora: {method: lora, rank: 2, lr: 1e-3}
training: {steps: 1, max_length: 16}
"""

Complain = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer with a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def complain(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Complain:
    """Run the command in a folder with RECIPE, its data and its model; returns the problems that it printed.

    Checks what holds for every bad input: status 2, `error: ` lines only, no traceback, nothing written.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "lua.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    (tmp_path / "bad.yaml").write_text(RECIPE)

    def complain(*words: str) -> list[str]:
        before = listing(tmp_path)
        capfd.readouterr()
        assert main(["train", *(words or ["recipe=bad.yaml"])]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        others = (
            "bad: 1 tasks, base ",
            "Loading weights",
        )  # the line that announces a run, and transformers' own bar
        lines = [line for line in err.splitlines() if line and not line.startswith(others)]
        assert lines
        assert all(line.startswith("error: ") for line in lines), err
        assert listing(tmp_path) == before
        return [line.removeprefix("error: ") for line in lines]

    return complain


def listing(folder: Path) -> dict[str, int]:
    """Files and folders with the time of their last change; the token cache is not the run's."""
    found = (path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts)
    return {str(path): path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["recipe=quikstart"],
            ["recipe = 'quikstart': no recipe of that name in recipes/; *. Did you mean 'quickstart'?"],
        ),
        ([], ["recipe: is required: recipe=NAME *"]),
        (
            ["training.stepz=3"],
            ["training.stepz: unknown key; the keys here are *. Did you mean 'training.steps'?"],
        ),
        (
            ["adapters.lora.method=lorra"],
            ["adapters.lora.method = 'lorra': must be dora, *, mixlora or switch. Did you mean 'lora'?"],
        ),
        (["adapters.lora.rank=0"], ["adapters.lora.rank = 0: must be at least 1"]),
        (["adapters.lora.rank=-4"], ["adapters.lora.rank = -4: must be at least 1"]),
        (
            ["adapters.lora.method=ia3"],
            ["adapters.lora.rank = 2: has no meaning for method ia3; it belongs to *: remove it"],
        ),
        (["tasks.lua.train=none.jsonl"], ["tasks.lua.train = 'none.jsonl': no such file in *"]),
        (
            ["tasks.lua.text=code"],
            ["tasks.lua.text = 'code': 'code' is not a column of the training rows; they have doc or text."],
        ),
        (
            ["tasks.lua.text='# {dok}'"],
            [
                (
                    "tasks.lua.text = '# {dok}': 'dok' is not a column of the training rows; *. "
                    "Did you mean 'doc'?"
                )
            ],
        ),
        (
            [
                "tasks.lua.truncation=drop",
                "tasks.lua.text='{doc} {doc} {doc} {doc} {doc} {doc} {doc} {doc} {doc}'",
            ],
            ["tasks.lua.train: no usable example among 9 rows: 0 empty, 9 over-long, 0 with a prompt of *"],
        ),
        (["model.path=./nothing/here"], ["model.path = './nothing/here': no such folder"]),
        (
            [
                "training.tokens_per_step=16",
                "adapters.x={method: ia3, lr: 1}",
                "adapters.y={method: ia3, lr: 1}",
            ],
            [
                (
                    "training.tokens_per_step = 16: cannot hold one draw of task 'lua': 1 example(s) of up "
                    "to 7 tokens for each of 3 *"
                )
            ],
        ),
        (
            ["overwrite=true", "resume=true"],
            ["resume = True: contradicts overwrite=true, which deletes the run: set one of them"],
        ),
        (["num_processes=3"], ["num_processes = 3: but 1 process(es) run; start it with: *"]),
        (
            ["adapters.lora.rank=0", "training.stepz=3", "tasks.lua.train={}", "adapters.x.method=flora"],
            [
                "tasks.lua.train.folder: give exactly one of hub, files, common_voice or folder, not none",
                "adapters.lora.rank = 0: must be at least 1",
                "adapters.x.lr: is required",
                "training.stepz: unknown key; *",
            ],
        ),
        (["--training.steps", "3"], ["--training.steps 3: options are written key=value: training.steps=3"]),
        (
            ["adapters.lora.target_modules=[q_prj]"],
            [
                (
                    "adapters.lora.target_modules = 'q_prj': matches no module of LlamaForCausalLM; it has "
                    "*. Did you mean 'q_proj'?"
                )
            ],
        ),
    ],
)
def test_one_line_per_problem_names_key_value_and_fix(
    complain: Complain, words: list[str], lines: list[str]
) -> None:
    recipe = [] if not words or words[0].startswith("recipe=") else ["recipe=bad.yaml"]
    found = complain(*recipe, *words) if words else complain("seed=1")
    assert len(found) == len(lines), found
    for line, pattern in zip(found, lines, strict=True):
        begin, star, end = pattern.partition("*")
        assert line.startswith(begin)
        assert line.endswith(end) if star else line == pattern


def test_empty_file_is_refused(complain: Complain, tmp_path: Path) -> None:
    (tmp_path / "lua.jsonl").write_text("")
    assert complain() == ["tasks.lua.train = 'lua.jsonl': is empty: give a file with rows"]


def test_rows_that_are_all_empty_are_refused_with_their_number(complain: Complain, tmp_path: Path) -> None:
    (tmp_path / "lua.jsonl").write_text('{"text": " "}\n' * 4)
    (line,) = complain()
    assert line.startswith("tasks.lua.train: no usable example among 3 rows: 3 empty")


@pytest.mark.parametrize(("section", "name", "line"), [("tasks", "lua", 6), ("adapters", "lora", 8)])
def test_two_of_one_name_are_refused(
    complain: Complain, tmp_path: Path, section: str, name: str, line: int
) -> None:
    value = "{train: lua.jsonl}" if section == "tasks" else "{method: ia3, lr: 1}"
    (tmp_path / "bad.yaml").write_text(RECIPE.replace(f"{section}:\n", f"{section}:\n  {name}: {value}\n"))
    assert complain() == [
        f"bad.yaml:{line} = {name!r}: this key is given twice (first on line {line - 1}): rename one"
    ]


def test_adapters_whose_joined_names_collide_are_refused(complain: Complain) -> None:
    (line,) = complain(
        "recipe=bad.yaml", "tasks.lua-lora.train=lua.jsonl", "adapters.lora-lora={method: ia3, lr: 1}"
    )
    assert line == (
        "adapters = 'lua-lora-lora': two adapters (task-adapter) would have this name: "
        "rename a task or adapter"
    )


def test_tokenizer_without_end_token_is_refused(complain: Complain, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    (line,) = complain("recipe=bad.yaml", "model.path=other")
    assert line.startswith(
        "model.path = 'other': has a tokenizer without an end-of-sequence token: set tokenizer.eos_token"
    )


def occupy(folder: Path, finished: bool | None) -> None:
    """A run (finished or not), or (None) somebody's files."""
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("keep me")
    if finished is not None:
        (folder / "run.json").write_text(json.dumps({"finished": finished}))


@pytest.mark.parametrize(
    ("finished", "words", "reason"),
    [
        (True, [], "holds a finished run: choose another output_dir, or overwrite=true"),
        (
            False,
            [],
            (
                "holds an unfinished run: choose another output_dir, "
                "resume=true to continue it, or overwrite=true"
            ),
        ),
        (None, [], "is not empty and holds no run"),
        (None, ["resume=true"], "is not empty and holds no run"),
        (None, ["overwrite=true"], "is not empty and holds no run"),
    ],
)
def test_output_folder_that_holds_something_is_refused_and_kept(
    complain: Complain, tmp_path: Path, finished: bool | None, words: list[str], reason: str
) -> None:
    occupy(tmp_path / "outputs" / "bad", finished)
    (line,) = complain("recipe=bad.yaml", *words)
    assert line.startswith(f"output_dir = 'outputs/bad': {reason}")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "tasks.lua.train={hub: nobody/nothing}",
            (
                "tasks.lua.train.hub = 'nobody/nothing': is not in the local cache, and HF_HUB_OFFLINE "
                "forbids access to the hub: *"
            ),
        ),
        ("model.path=nobody/nothing", "model.path = 'nobody/nothing': *"),
    ],
)
def test_hub_name_while_offline_is_refused(complain: Complain, tmp_path: Path, word: str, line: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = python(
        str(PROJECT_ROOT / "train.py"), "recipe=bad.yaml", word, environment=environment, folder=tmp_path
    )
    assert done.returncode == 2, done.stderr
    announced, error = done.stderr.splitlines()
    assert announced.startswith("bad: 1 tasks, base ")
    assert error.startswith(f"error: {line.rstrip('*')}"), done.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "no command 'trian': there are *. Did you mean 'train'?"),
        (
            ["evaluate", "nowhere"],
            "run = 'nowhere': is not a run folder *",
        ),
        (["export"], "RUN: is required; usage: flora-train export RUN *"),
        (["export", "nowhere", "--as", "lora"], "as = 'lora': *"),
        (
            ["export", "nowhere", "--rank", "8"],
            "rank = 8: has no meaning for --as peft: it is for --as lora-svd",
        ),
        (
            ["export", "nowhere", "--as", "lora-svd", "--rank", "8", "--max-error=0.1"],
            "max_error = 0.1: and rank both set the rank: give one",
        ),
        (
            ["export", "nowhere", "--max-eror", "1"],
            "--max-eror: unknown option; there are *. Did you mean '--max-error'?",
        ),
    ],
)
def test_other_commands_answer_in_one_line(
    words: list[str], line: str, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    begin, _, end = f"error: {line}\n".partition("*")
    assert err.startswith(begin)
    assert err.endswith(end)
    assert err.count("\n") == 1
