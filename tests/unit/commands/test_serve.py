"""What flora-train serve derives from a run: names of the base, chat template, and the request that it
prints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flora_train.commands.serve import base_names, chat_template_file, example_request
from flora_train.commands.serve_source import Served
from flora_train.commands.serve_text import PROMPT, Example
from flora_train.config.load import validate
from flora_train.runtime.run_folder import RunFolder
from flora_train.serving.catalogue import FolderSource
from flora_train.serving.vllm_flags import Base, Flags
from tests.e2e.conftest import save_tiny_checkpoint

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("serve") / "base")


def served(checkpoint: Path, folder: Path, **tasks: dict[str, Any]) -> Served:
    """A run with these tasks and one family of adapters."""
    entries = {name: {"train": "rows.jsonl", **task} for name, task in tasks.items()}
    config = validate(
        {
            "name": "run",
            "model": {"path": str(checkpoint)},
            "tasks": entries,
            "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
            "training": {"steps": 1},
        }
    )
    adapters = {name: folder / "adapters" / name for name in config.adapter_names}
    for path in adapters.values():
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text("{}")
    source = FolderSource("run", folder / "adapters")
    base = Base(str(checkpoint))
    return Served(source, base, config.model, (RunFolder(folder), config), adapters)


def test_the_chat_template_of_the_tasks_is_served(checkpoint: Path, tmp_path: Path) -> None:
    run = served(checkpoint, tmp_path / "run", one={"chat_template": "plain"}, two={"chat_template": "plain"})
    file = chat_template_file(run, Flags(), tmp_path)
    assert file is not None
    assert "messages" in file.read_text()
    assert chat_template_file(run, Flags(("--chat-template", "mine.jinja")), tmp_path) is None


def test_of_several_chat_templates_none_is_chosen(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = served(
        checkpoint, tmp_path / "run", one={"chat_template": "plain"}, two={"chat_template": "chatml"}
    )
    with caplog.at_level(logging.WARNING):
        assert chat_template_file(run, Flags(), tmp_path) is None
    assert "chatml or plain" in caplog.text


def test_without_a_chat_template_nothing_is_served(checkpoint: Path, tmp_path: Path) -> None:
    assert chat_template_file(served(checkpoint, tmp_path / "run", one={}), Flags(), tmp_path) is None


def test_the_request_has_a_prompt_of_the_adapter_s_task(checkpoint: Path, tmp_path: Path) -> None:
    text = served(checkpoint, tmp_path / "text", one={"sample_prompts": ["local function"]})
    assert example_request(text, "base", None) == Example("one-lora", "local function")
    chat = served(checkpoint, tmp_path / "chat", one={"sample_prompts": [MESSAGES]})
    assert example_request(chat, "base", None) == Example("one-lora", messages=MESSAGES)
    none = served(checkpoint, tmp_path / "none", one={})
    assert example_request(none, "base", None) == Example("one-lora", PROMPT)


def test_messages_need_the_chat_template_of_their_task(checkpoint: Path, tmp_path: Path) -> None:
    task = {"sample_prompts": [MESSAGES], "chat_template": "plain"}
    run = served(checkpoint, tmp_path / "run", one=task)
    assert example_request(run, "base", tmp_path / "chat_template.jinja").messages == MESSAGES
    assert example_request(run, "base", None).messages is None


def test_the_base_has_names_that_no_adapter_has(checkpoint: Path, tmp_path: Path) -> None:
    run = served(checkpoint, tmp_path / "run", one={})
    assert base_names(run, Flags()) == ("base", str(checkpoint))
    assert base_names(run, Flags(("--served-model-name", "mine"))) == ()
    folder = tmp_path / "run" / "adapters" / "base"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    assert base_names(run, Flags()) == (str(checkpoint),)
