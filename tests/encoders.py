"""Tiny encoders with a tokenizer, as they are published, and labelled texts for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, BertTokenizer

from tests.architectures import ENCODERS, architecture_config

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
EMBEDDING_BASES = tuple(ENCODERS)
"""Encoders whose adapters of embeddings are loaded in sentence-transformers
(tests/e2e/test_sentence_transformers.py)."""
FRUIT, METALS = ("apple", "pear", "plum", "fig"), ("iron", "zinc", "gold", "tin")


def save_encoder(folder: Path, architecture: str = "bert") -> Path:
    """A random-weight encoder with the head of its pretraining, and a tokenizer of letters."""
    torch.manual_seed(0)
    config: Any = architecture_config(architecture)
    config.pad_token_id = 0
    model: Any = AutoModelForMaskedLM.from_config(config)
    model.save_pretrained(folder)
    tokens = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *"0123456789"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=60)
    tokenizer.save_pretrained(folder)
    return folder


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of fruit or metals, with a kind, words, tags, several labels and a number."""
    generator = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        kind = generator.choice(["fruit", "metal"])
        pool = FRUIT if kind == "fruit" else METALS
        words = [generator.choice(pool) for _ in range(generator.randint(2, 4))]
        rows.append(
            {
                "text": " ".join(words),
                "other": generator.choice([*FRUIT, *METALS]),
                "kind": kind,
                "tokens": words,
                "tags": ["LONG" if len(word) > 3 else "SHORT" for word in words],
                "flags": sorted({"four" for word in words if len(word) == 4} | {kind}),
                "length": float(len(words)),
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
