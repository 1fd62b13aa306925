"""A tiny base model with a chat template, and tasks of conversations and preferences for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.unit.data.conftest import byte_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Its end of a turn is not the end token of the model."""


def save_chat_base(folder: Path, template: str | None = CHATML, positions: int = 512) -> Path:
    """A random-weight Llama that reads bytes and the two tokens of ChatML."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def conversations(words: str) -> list[dict[str, Any]]:
    """Short conversations of two turns, about these words."""
    rows = []
    for word in words.split():
        turns = [
            ("user", f"say {word}"),
            ("assistant", f"{word}!"),
            ("user", "more"),
            ("assistant", f"{word}?"),
        ]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_recipe(folder: Path, model: Path, tasks: dict[str, Any], **sections: Any) -> Path:
    """A recipe of two methods that trains in seconds."""
    content = {
        "name": "talk",
        "num_threads": 1,
        "model": {"path": str(model), "dtype": "float32"},
        "tasks": tasks,
        "adapters": {
            "flora": {"method": "flora", "rank": 2, "lr": 0.1},
            "lora": {"method": "lora", "rank": 4, "lr": 0.05},
        },
        "mixture": {"examples_per_draw": 2},
        "training": {"steps": 8, "tokens_per_step": 800, "tokens_per_microbatch": 800, "max_length": 128},
        "evaluation": {"interval": None, "max_new_tokens": 8, "bootstrap_samples": 100},
        **sections,
    }
    path = folder / "talk.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
