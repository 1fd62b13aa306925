"""Tokenizers of encoders, and tasks of labelled texts for tests."""

from __future__ import annotations

import string
from typing import Any

from transformers import BertTokenizer, RobertaTokenizer

LETTERS = string.ascii_lowercase + string.digits


def bert_tokenizer() -> Any:
    """Words of films, and letters for all others; it has token types and no end token."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,![]"]
    words = [*marks, *LETTERS, *(f"##{letter}" for letter in LETTERS), "good", "bad", "film"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def roberta_tokenizer(add_prefix_space: bool = False) -> Any:
    """Bytes and a few words, of which a space is part; it has no token types."""
    from tokenizers import pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("Ġ", "b"), ("Ġb", "a"), ("Ġba", "d"), ("b", "a"), ("ba", "d")]
    words += ["".join(pair) for pair in merges]
    vocab = {word: i for i, word in enumerate(words)}
    return RobertaTokenizer(vocab=vocab, merges=merges, add_prefix_space=add_prefix_space)


def films(count: int = 30) -> list[dict[str, Any]]:
    """Rows with one label, several labels, a number and tags; a third of them are bad films."""
    rows = []
    for i in range(count):
        is_bad = i % 3 == 0
        word = "bad" if is_bad else "good"
        rows.append(
            {
                "text": f"{word} film {i}",
                "question": f"is {i} good",
                "label": "neg" if is_bad else "pos",
                "stars": i / 2,
                "genres": ["war"] * (i % 2) + ["love"] * is_bad,
                "tokens": [word, "film", "x.y"],
                "tags": ["J", "N", "J"],
            }
        )
    return rows
