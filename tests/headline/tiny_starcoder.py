"""A tiny GPT-BigCode model with StarCoder's configuration keys and special tokens, and its tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
)
"""StarCoder's, with ids from 0."""
VOCABULARY = 2048
SHARD = "400KB"
"""Largest shard of the weights, so that there are several, as of the published model."""


PRETRAINING_STEPS, ROWS, LENGTH = 120, 8, 128
"""Of the training of the base, which takes seconds: attention of random weights would hardly matter, and
neither would adapters of it."""


def write_starcoder(folder: Path, texts: Sequence[str]) -> None:
    """Write the model and its tokenizer, trained on `texts`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, texts)
    write_model(folder, texts)


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """A byte-level BPE with single digits, and the published files beside it. It has no padding token."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    learnt = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _write_json(folder / "vocab.json", learnt["vocab"])
    merges = [" ".join(pair) for pair in learnt["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    end = SPECIAL_TOKENS[0]
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    _write_json(
        folder / "special_tokens_map.json", {"additional_special_tokens": list(SPECIAL_TOKENS), **special}
    )
    settings = {
        "add_prefix_space": False,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": len(learnt["vocab"]),
    }
    _write_json(folder / "tokenizer_config.json", {**settings, **special})


def write_model(folder: Path, texts: Sequence[str]) -> None:
    """A model of a few seconds' training in several shards, with StarCoder's configuration except for the
    sizes."""
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    vocabulary = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    config = {
        "activation_function": "gelu",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "attn_pdrop": 0.1,
        "bos_token_id": 0,
        "embd_pdrop": 0.1,
        "eos_token_id": 0,
        "inference_runner": 0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "max_batch_size": None,
        "max_sequence_length": None,
        "model_type": "gpt_bigcode",
        "multi_query": True,
        "n_embd": 64,
        "n_head": 4,
        "n_inner": 256,
        "n_layer": 2,
        "n_positions": 8192,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "resid_pdrop": 0.1,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "torch_dtype": "float32",
        "transformers_version": "4.28.1",
        "use_cache": True,
        "validate_runner_input": True,
        "vocab_size": vocabulary,
    }
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = GPTBigCodeForCausalLM(GPTBigCodeConfig(**config))
        _pretrain(model, folder, texts)
    model.save_pretrained(folder, max_shard_size=SHARD)
    _write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0}
    _write_json(folder / "generation_config.json", {**generation, "transformers_version": "4.28.1"})


def _pretrain(model: Any, folder: Path, texts: Sequence[str]) -> None:
    """A few steps on one thread, so that the sums are the same on a machine with more cores."""
    import torch
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(list(texts))
    tokens = torch.tensor([token for text in encoded for token in [*text.ids, 0]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (ROWS,))
        rows = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
