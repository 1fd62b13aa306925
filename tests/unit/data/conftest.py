"""Tiny tokenizers, and tasks that live in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.data.task import Task, load_tasks


def byte_tokenizer(start: bool = False, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """One token a UTF-8 byte, and a few merged ones; `<e>` ends, `<p>` pads, `<s>` may start a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<e>", "<p>", "<s>"])
    if start:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A <e>", special_tokens=[("<s>", len(words) + 2), ("<e>", len(words))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>", pad_token="<p>", bos_token="<s>")


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file below the working directory: text, bytes, or rows as JSON lines."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes | list[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def run_config(tasks: dict[str, Any], seed: int = 0, max_length: int = 64) -> RunConfig:
    """A configuration with these tasks."""
    return validate(
        {
            "name": "test",
            "seed": seed,
            "model": {"path": "unused"},
            "tasks": tasks,
            "adapters": {"ia3": {"method": "ia3", "lr": 1e-3}},
            "training": {"steps": 2, "max_length": max_length},
        }
    )


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, Task]]:
    """load(tokenizer, lua={...}, max_length=...) -> tasks, cached below the temporary folder."""

    def load(tokenizer: Any, seed: int = 0, max_length: int = 64, **tasks: Any) -> dict[str, Task]:
        return load_tasks(run_config(tasks, seed, max_length), tokenizer, tmp_path / "cache")

    return load
