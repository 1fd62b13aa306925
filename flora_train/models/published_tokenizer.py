"""What the repository of a model says of its tokenizer, where transformers builds another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flora_train.data.text_encoder import start_tokens

LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes of tokenizer_config.json for which `add_bos_token` has always had a meaning."""


def splits_otherwise(tokenizer: Any, file: Path) -> bool:
    """Whether a byte-level tokenizer splits text otherwise than its tokenizer.json says.

    Classes of transformers 5 that build their own pipeline leave out steps of the file. One is
    GPT2Tokenizer, for StarCoder2's single digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not file.is_file():
        return False
    published = json.loads(file.read_text(encoding="utf-8"))
    if "ByteLevel" not in [step["type"] for step in _steps(published.get("pre_tokenizer"))]:
        return False
    for part, loaded in (("normalizer", backend.normalizer), ("pre_tokenizer", backend.pre_tokenizer)):
        built = None if loaded is None else json.loads(loaded.__getstate__())
        if _steps(published.get(part)) != _steps(built):
            return True
    return False


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, without options that other settings of a tokenizer set."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("normalizers") or part.get("pretokenizers") or []
        return [step for one in inner for step in _steps(one)]
    if part["type"] == "ByteLevel":
        return [{"type": "ByteLevel", "use_regex": part.get("use_regex", True)}]
    return [part]


def add_declared_start(tokenizer: Any, file: Path) -> None:
    """Put the beginning token before each text, if tokenizer_config.json (`file`) declares it.

    transformers 5 reads this from tokenizer.json alone, where DeepSeek-Coder's files do not have it.
    """
    settings = settings_in(file)
    declared = settings.get("add_bos_token") is True
    known = str(settings.get("tokenizer_class")).removesuffix("Fast") in LLAMA_CLASSES
    if not declared or not known or tokenizer.bos_token_id is None or start_tokens(tokenizer):
        return
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.add_bos_token = True


def settings_in(file: Path) -> Any:
    """The content of a JSON file with settings; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
