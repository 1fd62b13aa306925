"""Runs on conversations beside text: two processes, resumption, init; and bad conversations."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from flora_train.cli import main
from flora_train.config.load import load_config
from tests.e2e.conftest import Launch
from tests.e2e.test_bad_input import RECIPE, Complain, complain, model
from tests.e2e.test_resume import Kill, kill_after

__all__ = ["complain", "kill_after", "model"]  # fixtures

TEMPLATE = """{%- for message in messages %}
    {{- message.role[0] + ':' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'a:' }}{%- endif %}
"""


@pytest.fixture(scope="module")
def chat_recipe(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe with two tasks of conversations beside its tasks of text, one of them packed."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "turns.jinja").write_text(TEMPLATE)
    letters = "abcdefgh"

    def chat(i: int) -> list[dict[str, Any]]:
        turns = []
        for turn in range(1 + i % 3):
            asked = letters[(i + turn) % 8]
            turns.append({"role": "user", "content": asked})
            turns.append({"role": "assistant", "content": asked * (1 + i % 2), "weight": int(i % 5 > 0)})
        turns[-1]["weight"] = 1
        return turns

    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat(i)}) for i in range(60)))
    content = yaml.safe_load(recipe.read_text())
    task = {"train": str(folder / "chats.jsonl"), "chat_template": str(folder / "turns.jinja")}
    content["tasks"] |= {"chats": {**task, "packing": True}, "last": {**task, "learn": "last"}}
    content["training"] |= {"tokens_per_step": 260, "tokens_per_microbatch": 130}
    path = folder / "chat.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(chat_recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "chat"
    done = launch(f"recipe={chat_recipe}", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def adapters(run: Path) -> dict[str, Path]:
    """Adapter -> its weights."""
    return {file.parent.name: file for file in sorted(run.glob("adapters/*/adapter_model.safetensors"))}


def test_adapters_of_conversations_learn_and_the_report_counts_their_turns(finished: Path) -> None:
    report = json.loads((finished / "eval" / "report.json").read_text())
    counts = {task["name"]: task["train"] for task in report["tasks"]}
    assert counts["chats"]["examples"] < counts["chats"]["documents"]
    assert (
        0 < counts["last"]["label_tokens"] < counts["chats"]["label_tokens"] < counts["chats"]["tokens"] / 2
    )


def test_two_processes_equal_one_to_1e_6(
    finished: Path, launch: Launch, chat_recipe: Path, tmp_path: Path
) -> None:
    done = launch(f"recipe={chat_recipe}", f"output_dir={tmp_path / 'two'}", "num_processes=2", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = adapters(finished), adapters(tmp_path / "two")
    assert one.keys() == two.keys()
    assert {name.partition("-")[0] for name in one} == {"letters", "digits", "chats", "last"}
    for name, file in one.items():
        left, right = load_file(file), load_file(two[name])
        assert max(float((left[key] - right[key]).abs().max()) for key in left) <= 1e-6


def test_a_killed_run_resumes_to_the_bytes_of_an_uninterrupted_one(
    finished: Path, launch: Launch, kill_after: Kill, chat_recipe: Path, tmp_path: Path
) -> None:
    words = (f"recipe={chat_recipe}", "training.steps=40", "training.save_every=5", "evaluation.interval=20")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(*words, f"output_dir={whole}").returncode == 0
    kill_after(10, parts, *words, f"output_dir={parts}", "resume=true", number=signal.SIGKILL)
    last = launch(*words, f"output_dir={parts}", "resume=true")
    assert last.returncode == 0, last.stderr
    assert "resuming after step" in last.stderr
    ends = [{name: file.read_bytes() for name, file in adapters(run).items()} for run in (whole, parts)]
    assert ends[0] == ends[1]


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
CALLS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "1"},
    ANSWER,
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "openai": {"messages": [USER, ANSWER]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
    "tools": {"messages": CALLS, "tools": [{"type": "function", "function": {"name": "f"}}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "pairs": {"prompt": [USER], "completion": [ANSWER]},
}


def test_init_recognises_conversations_in_every_layout(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has no template: the recipe names one that is shipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, row in LAYOUTS.items():
        Path(f"{name}.jsonl").write_text("\n".join(json.dumps(row) for _ in range(30)))
    rows = [json.dumps(LAYOUTS["openai"]["messages"]).replace('"', '""')] * 30
    Path("text.csv").write_text("messages\n" + "".join(f'"{row}"\n' for row in rows))
    files = [*(f"{name}.jsonl" for name in LAYOUTS), "text.csv"]
    assert main(["init", *files, "--model", str(model), "--out", "mine.yaml"]) == 0
    assert (
        "30 conversations, the assistant's turns of messages are learnt, with tools"
        in capsys.readouterr().out
    )
    tasks = load_config(["recipe=mine.yaml"]).tasks
    assert {name: task.messages for name, task in tasks.items()} == {
        "openai": "messages",
        "parts": "messages",
        "tools": "messages",
        "sharegpt": "conversations",
        "pairs": None,
        "text": "messages",
    }
    assert (tasks["pairs"].prompt, tasks["pairs"].completion) == ("prompt", "completion")
    assert {task.chat_template for task in tasks.values()} == {"plain"}
    assert main(["data", "recipe=mine.yaml"]) == 0


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([USER, {"role": "robot", "content": "x"}], "message 2 of 'messages' has the unknown role 'robot'"),
        ([], "'messages' is an empty conversation: give it messages, or remove the row"),
        ([USER], "the conversation has no turn of the assistant, so that nothing is learnt: add one"),
        (
            [USER, {**ANSWER, "tool_calls": [{"function": {}}]}],
            "message 2 of 'messages' has a tool call without",
        ),
        ([{"role": "system", "content": "x"}, ANSWER], "chat.jinja cannot render it: no system here"),
        (
            [USER, {**ANSWER, "weight": 3}],
            "message 2 of 'messages' has the weight 3: it must be 0 (not learnt) or 1",
        ),
    ],
)
def test_a_bad_conversation_is_one_line_with_file_row_and_fix(
    complain: Complain, tmp_path: Path, messages: Any, line: str
) -> None:
    template = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system here') }}{%- endif %}"
    (tmp_path / "chat.jinja").write_text(template + TEMPLATE)
    rows = [{"messages": [USER, ANSWER]}] * 6 + [{"messages": messages}] + [{"messages": [USER, ANSWER]}] * 2
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("lua.jsonl", "chats.jsonl, chat_template: chat.jinja"))
    (said,) = complain()
    assert said.startswith("tasks.lua: chats.jsonl, row 7: ")
    assert line in said


def test_a_base_without_a_chat_template_is_one_line_with_the_key(complain: Complain, tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps({"messages": [USER, ANSWER]})] * 9))
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("lua.jsonl", "chats.jsonl"))
    (said,) = complain()
    assert said.startswith("tasks.lua.chat_template: is needed: the base's tokenizer has no chat template")


def test_conversations_that_are_all_cut_off_are_counted(complain: Complain, tmp_path: Path) -> None:
    long = {"messages": [{**USER, "content": "x" * 30}, ANSWER]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(long)] * 9))
    (tmp_path / "bad.yaml").write_text(RECIPE.replace("lua.jsonl", "chats.jsonl, chat_template: plain"))
    (said,) = complain()
    assert "with a prompt of training.max_length = 16 tokens or more" in said
