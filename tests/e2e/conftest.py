"""A tiny checkpoint, data and recipe on disk, and the launcher as a user would call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.forked import ROOT, python

WORDS = ["<pad>", "<end>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 =+().:\n"]

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def save_tiny_checkpoint(folder: Path, **special: Any) -> Path:
    """A random-weight Llama and a character tokenizer; `special` replaces its special tokens."""
    tokens = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>", **special}
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=len(WORDS),
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **sizes,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """Two small learnable tasks x three methods, 12 steps."""
    folder = tmp_path_factory.mktemp("recipe")
    tasks = {"letters": "abcdefgh", "digits": "01234567"}
    for name, alphabet in tasks.items():
        rows = [
            {"prompt": alphabet[i % 8], "completion": (alphabet * 4)[i % 8 + 1 : i % 8 + 9 + i % 5]}
            for i in range(60)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "name": "tiny",
        "num_threads": 1,
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "tasks": {
            name: {"train": str(folder / f"{name}.jsonl"), "sample_prompts": [alphabet[0]]}
            for name, alphabet in tasks.items()
        },
        "adapters": {
            "flora": {"method": "flora", "rank": 2, "lr": 0.1},
            "lora": {"method": "lora", "rank": 2, "lr": 0.05, "dropout": 0.1},
            "ia3": {"method": "ia3", "lr": 0.1},
        },
        "mixture": {"strategy": "uniform"},
        "training": {
            "steps": 12,
            "tokens_per_step": 100,
            "tokens_per_microbatch": 60,
            "max_length": 32,
            "log_every": 4,
        },
        "evaluation": {"interval": 6, "max_new_tokens": 4, "bootstrap_samples": 200},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


PLANTED = "planted-secret-5c1f"
"""The value of secrets in the environment of every run."""


def launch_command(*words: str, processes: int = 1) -> list[str]:
    """accelerate launch train.py, as a user would call it."""
    config = ROOT / "launch" / ("single.yaml" if processes == 1 else "cpu_2proc.yaml")
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        str(ROOT / "train.py"),
        *words,
    ]


def launch_environment(cache: Path) -> dict[str, str]:
    ours = {
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    return {
        **os.environ,
        **ours,
        **dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "FLORA_TEST_SECRET"), PLANTED),
    }


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launch("recipe=...", processes=2)`: train.py in a process of its own, or two."""
    environment = launch_environment(tmp_path_factory.mktemp("cache"))

    def run(*words: str, processes: int = 1, accelerate: bool = False) -> subprocess.CompletedProcess[str]:
        """accelerate: through its launcher, from nothing, which takes many seconds."""
        if not accelerate:
            return python("train.py", *words, environment=environment, processes=processes)
        command = launch_command(*words, processes=processes)
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return run
