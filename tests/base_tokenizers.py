"""Tokenizers of code models as they are published, trained on the code in assets/code.

Each has the classes, special tokens and pipeline of its model, and a small vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from flora_train.config.paths import PROJECT_ROOT

VOCABULARY = 700
"""Tokens that are trained, without those that are added."""
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = GPT4_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK_WORDS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Published:
    """A tokenizer as its model's repository has it."""

    core: Tokenizer
    settings: dict[str, Any]
    """tokenizer_config.json, without the list of added tokens."""

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as in a repository."""
        folder.mkdir(parents=True, exist_ok=True)
        self.core.save(str(folder / "tokenizer.json"))
        added = json.loads(self.core.to_str())["added_tokens"]
        decoder = {str(token.pop("id")): token for token in added}
        content = {"added_tokens_decoder": decoder, **self.settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))


def code() -> Iterator[str]:
    """Code of three languages."""
    for language in ("lua", "perl", "ruby"):
        file = PROJECT_ROOT / "assets" / "code" / f"{language}.validation.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["prompt"] + row["completion"]


def byte_level(pre_tokenizer: Any, first: tuple[str, ...] = (), normalizer: Any = None) -> Tokenizer:
    """A byte-level BPE. first: special tokens that have the first ids."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(code(), trainer)
    return core


def split(pattern: str) -> Any:
    """The words of a pattern, and what is between them."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def bytes_only() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def starcoder2() -> Published:
    """Digits one by one, then GPT-2's words; no padding token."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    special = (END_OF_TEXT, "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>")
    core = byte_level(pre_tokenizers.Sequence(steps), (*special, "<file_sep>", "<issue_start>"))
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"add_prefix_space": False, "clean_up_tokenization_spaces": True, **names}
    return Published(core, {**settings, "tokenizer_class": "GPT2Tokenizer", "vocab_size": VOCABULARY})


def qwen25_coder() -> Published:
    """No beginning token; the end token pads; tokens of fill-in-the-middle are not flagged as special."""
    steps = pre_tokenizers.Sequence([split(QWEN_WORDS), bytes_only()])
    core = byte_level(steps, normalizer=normalizers.NFC())
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.add_special_tokens([END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"])
    marks = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>", "<|file_sep|>")
    core.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    settings = {"add_bos_token": False, "add_prefix_space": False, "bos_token": None, "unk_token": None}
    ends = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "split_special_tokens": False}
    return Published(core, {**settings, **ends, "tokenizer_class": "Qwen2Tokenizer"})


def deepseek_coder() -> Published:
    """Declared as Llama's, but byte-level; some letters are added tokens; the end token pads."""
    steps = [split(pattern) for pattern in DEEPSEEK_WORDS]
    digits = pre_tokenizers.Digits(individual_digits=True)
    core = byte_level(pre_tokenizers.Sequence([*steps, digits, bytes_only()]))
    core.normalizer = normalizers.Sequence([])
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.add_tokens([AddedToken(letter, normalized=True, special=False) for letter in "\u00f5\u00f7\u00c1"])
    core.add_tokens([AddedToken(mark, normalized=True, special=True) for mark in (BEGIN, END)])
    marks = ("<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>")
    core.add_tokens([AddedToken(mark, special=False) for mark in (*marks, "<pad>", "<|User|>", "<|EOT|>")])
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": None}
    named = {name: None if word is None else _added(word) for name, word in names.items()}
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": True, "model_max_length": 16384}
    return Published(core, {**settings, **named, "tokenizer_class": "LlamaTokenizerFast"})


def code_llama() -> Published:
    """SentencePiece's BPE with a beginning token, a space before each text, and no padding token."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    first = ["<unk>", "<s>", "</s>", *bytes_]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        code(), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=first, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = models.BPE(
        model["vocab"],
        [tuple(merge) for merge in model["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    core = Tokenizer(pieces)
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(
        [AddedToken(word, normalized=True, special=True) for word in ("<unk>", "<s>", "</s>")]
    )
    marks = {"suffix": "\u2581<SUF>", "prefix": "\u2581<PRE>", "middle": "\u2581<MID>", "eot": "\u2581<EOT>"}
    core.add_special_tokens([AddedToken(mark, normalized=False, special=True) for mark in marks.values()])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"add_bos_token": True, "add_eos_token": False, "pad_token": None, "sp_model_kwargs": {}}
    settings |= {name: _added(word) for name, word in names.items()}
    settings |= {f"{name}_token": mark for name, mark in marks.items()}
    return Published(core, {**settings, "fill_token": "<FILL_ME>", "tokenizer_class": "CodeLlamaTokenizer"})


def olmo2() -> Published:
    """GPT-4's words; one token begins, ends and stands for unknown text, and another pads."""
    core = byte_level(pre_tokenizers.Sequence([split(GPT4_WORDS), bytes_only()]))
    core.add_special_tokens([END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>"])
    marks = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    core.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    settings = {"add_prefix_space": False, "pad_token": "<|pad|>", "model_max_length": 8192}
    return Published(core, {**settings, **names, "tokenizer_class": "GPT2Tokenizer"})


def _added(word: str) -> dict[str, Any]:
    """A token in older configurations."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": word, "normalized": True, **flags}


PUBLISHED: dict[str, Callable[[], Published]] = {
    "starcoder2": cache(starcoder2),
    "qwen2.5-coder": cache(qwen25_coder),
    "deepseek-coder": cache(deepseek_coder),
    "codellama": cache(code_llama),
    "olmo2": cache(olmo2),
}
