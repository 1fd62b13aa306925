"""Recipes of embeddings on a tiny decoder or encoder, and their pairs and triplets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast

from tests.e2e.conftest import WORDS

THINGS = ("cup", "hat", "box", "key", "pen", "jar", "bag", "map", "bed", "fan")
PLACES = ("hall", "yard", "shop", "barn", "park", "dock", "cave", "farm")


def triplet(number: int) -> dict[str, str]:
    """Row `number` of 80 different ones."""
    thing, place = THINGS[number % 10], PLACES[number // 10 % 8]
    other = THINGS[(number + 3) % 10]
    return {
        "question": f"where is the {thing} of the {place}",
        "answer": f"in the {place} is the {thing}",
        "wrong": f"in the {place} is the {other}.",
        "text": f"{place} and {thing}",
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def save_tiny_encoder(folder: Path) -> Path:
    """A random-weight BERT with its language-model head, and a tokenizer that puts [CLS] and [SEP] around a
    text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS[3:]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


def write_recipe(
    folder: Path, model: Path, tasks: Mapping[str, Mapping[str, Any]], adapters: Mapping[str, Any]
) -> Path:
    """A recipe of these tasks on 60 training and 20 held-out triplets."""
    files = {
        "train": write_rows(folder / "train.jsonl", [triplet(number) for number in range(60)]),
        "validation": write_rows(folder / "validation.jsonl", [triplet(n) for n in range(60, 80)]),
    }
    content = {
        "name": "embeddings",
        "num_threads": 1,
        "model": {"path": str(model), "dtype": "float32"},
        "tasks": {name: {**files, **keys} for name, keys in tasks.items()},
        "adapters": dict(adapters),
        "mixture": {"examples_per_draw": 4},
        "training": {
            "steps": 12,
            "tokens_per_step": 3000,
            "tokens_per_microbatch": 1000,
            "max_length": 64,
            "log_every": 3,
            "save_every": 3,
        },
        "evaluation": {"interval": 6, "max_new_tokens": 4, "bootstrap_samples": 100},
    }
    path = folder / "embeddings.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


PAIRS = {"anchor": "question", "positive": "answer"}
TRIPLETS = {**PAIRS, "anchor": "find: {question}", "negative": "wrong"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2, "lr": 0.02, "dropout": 0.1},
    "flora": {"method": "flora", "rank": 2, "lr": 0.05},
    "pure": {"method": "flora", "variant": "pure", "rank": 1, "lr": 0.05},
    "ia3": {"method": "ia3", "lr": 0.05},
}
