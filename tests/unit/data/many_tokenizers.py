"""Tiny tokenizers of every kind that base models have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.byt5 import ByT5Tokenizer

from flora_train.config.paths import PROJECT_ROOT
from tests.unit.data.conftest import byte_tokenizer

LETTERS = [chr(i) for i in range(33, 127)]
MARKS = (
    AddedToken("<think>", special=False, normalized=True),
    AddedToken("<|user|>", special=True, normalized=False, rstrip=True),
    AddedToken("<|turn|>", special=True, normalized=False),
    AddedToken("[L]", special=True, normalized=False, lstrip=True),
)


def _finished(core: Tokenizer, start: bool) -> Any:
    core.add_special_tokens(["<s>", "</s>"])
    if start:
        ids = [(word, core.token_to_id(word)) for word in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.add_tokens(list(MARKS))
    return tokenizer


def unigram(scheme: str = "first", start: bool = True) -> Any:
    """SentencePiece's Unigram: its special tokens are pieces of its vocabulary, too."""
    words = ["<unk>", "<s>", "</s>", "\u2581", *LETTERS, "\n", "\u2581a", "ab", "\u2581the", "er", "4\u2581"]
    core = Tokenizer(
        models.Unigram(
            [(word, 0.0 if word.startswith("<") else -float(i)) for i, word in enumerate(words)], unk_id=0
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _finished(core, start)


def legacy_llama(start: bool = True) -> Any:
    """SentencePiece's BPE as Llama 2 has it: a normalizer puts the space before a text."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        *LETTERS,
        "\n",
        "\u2581a",
        "ab",
        "\u2581ab",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "ab")]
    core = Tokenizer(
        models.BPE(
            {w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    steps = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    core.decoder = decoders.Sequence(steps)
    return _finished(core, start)


def prefixed_bytes() -> Any:
    """RoBERTa's: bytes, with a space before a text; a marker can be reached by merges, too."""
    words = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "<unk>",
        "Ġa",
        "<t",
        "<th",
        "<thi",
        "<thin",
        "<think",
        "<think>",
    ]
    merges = [
        ("Ġ", "a"),
        ("<", "t"),
        ("<t", "h"),
        ("<th", "i"),
        ("<thi", "n"),
        ("<thin", "k"),
        ("<think", ">"),
    ]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _finished(core, start=False)


def words(start: bool = False) -> Any:
    """Whole words: those that it does not know are one unknown token."""
    vocabulary = ["<unk>", "<s>", "</s>", "<think>", "a", "b", "one", "two", "three", ":"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(core, start)


def word_pieces() -> Any:
    """BERT's, in lower case."""
    vocabulary = ["<unk>", "<s>", "</s>", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "##er"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _finished(core, start=False)


def spaced_pieces() -> Any:
    """T5's: words between spaces, each with its mark; spaces at the ends are stripped."""
    tokenizer = unigram("always", start=False)
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Strip()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return tokenizer


def slow() -> Any:
    """Without the tokenizers library: bytes."""
    tokenizer = ByT5Tokenizer(extra_ids=2, bos_token="</s>")
    tokenizer.add_tokens([token for token in MARKS if not (token.lstrip or token.rstrip)])
    return tokenizer


def smollm2() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PROJECT_ROOT / "assets/models/smollm2-135m")


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: byte_tokenizer(start=True),
    "unigram-first": unigram,
    "unigram-always": lambda: unigram("always"),
    "legacy-llama": legacy_llama,
    "prefixed-bytes": prefixed_bytes,
    "words": words,
    "word-pieces": word_pieces,
    "spaced-pieces": spaced_pieces,
    "slow": slow,
    "smollm2": smollm2,
}
