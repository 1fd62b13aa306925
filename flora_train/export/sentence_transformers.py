"""Writes beside an adapter what sentence-transformers needs to load it: the modules, their settings and the
tokenizer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from flora_train.config.embedding_schema import Pooling
from flora_train.config.json_format import JsonValue
from flora_train.runtime.atomic import disk_errors, temporary_folder
from flora_train.runtime.manifest import POOLING_FILE

if TYPE_CHECKING:
    from flora_train.run_context import RunContext

MODES: dict[Pooling, str] = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
"""Pooling -> its name in the settings of sentence-transformers."""
MODULES = "modules.json"


def write_embedding_files(context: RunContext, name: str, folder: Path) -> None:
    """Write the files into the exported folder of an adapter of a run, if it learnt embeddings."""
    spec = context.bank.specs[context.bank.ids[name]]
    if spec.pooling is not None:
        write_sentence_transformer(
            folder,
            pooling=spec.pooling,
            width=embedding_width(context.model),
            max_length=context.config.training.max_length,
            tokenizer=context.tokenizer,
        )


def write_sentence_transformer(
    folder: Path, *, pooling: Pooling, width: int, max_length: int, tokenizer: Any
) -> None:
    """Write the files into the folder of an adapter, or of a model, that learnt embeddings.

    width: size of the embeddings; max_length: tokens at which texts are cut off. Raises UserError if the
    files cannot be written.
    """
    files: dict[str, JsonValue] = {
        MODULES: [
            _module(0, "", "Transformer"),
            _module(1, str(Path(POOLING_FILE).parent), "Pooling"),
        ],
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
        POOLING_FILE: {
            "word_embedding_dimension": width,
            "include_prompt": True,
            **{f"pooling_mode_{name}": mode == pooling for mode, name in MODES.items()},
        },
    }
    with disk_errors(folder), temporary_folder(folder) as temporary:
        _padding(tokenizer).save_pretrained(temporary)
        for name, content in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        written = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: path.name == MODULES):  # complete with the last of them
            (folder / path).parent.mkdir(exist_ok=True)
            (temporary / path).replace(folder / path)


def embedding_width(model: nn.Module) -> int:
    """Size of the embeddings that a transformers model makes."""
    config: Any = model.config
    text = config.get_text_config()
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # of OPT the first
    return int(width)


def _module(index: int, path: str, kind: str) -> JsonValue:
    return {
        "idx": index,
        "name": str(index),
        "path": path,
        "type": f"sentence_transformers.models.{kind}",
    }


def _padding(tokenizer: Any) -> Any:
    """The tokenizer, with a padding token: texts of different lengths are embedded in one batch."""
    if tokenizer.pad_token is not None:
        return tokenizer
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.eos_token
    return padding
