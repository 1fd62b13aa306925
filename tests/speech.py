"""A tiny Whisper with random weights, and clips that are noise: everything real but small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from flora_train.config.speech_schema import AudioConfig
from flora_train.data.audio.decode import RATE
from flora_train.data.audio.features import FeatureStore
from flora_train.data.audio.speech_processor import GRAIN, SpeechProcessor, Windows
from flora_train.models.loading import disable_dropout
from flora_train.models.speech_encoder import allow_short_windows
from flora_train.runtime.progress import ProgressBar

POSITIONS, MEL_BINS = 100, 16
"""Of the tiny encoder: 2 seconds."""
SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|cs|>",
    "<|hi|>",
    "<|ru|>",
    "<|transcribe|>",
    "<|notimestamps|>",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and Whisper's special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL, "<|0.00|>"])
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIAL[0])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **end)


def tiny_whisper() -> Any:
    """The same at every call."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    end, start = tokenizer.convert_tokens_to_ids(SPECIAL[:2])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=MEL_BINS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=POSITIONS,
        max_target_positions=96,
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        apply_spec_augment=True,  # which must be switched off: its masks are drawn for the whole batch
        mask_time_length=2,
    )
    return with_random_weights(WhisperForConditionalGeneration(config))


@torch.no_grad()
def with_random_weights(model: Any) -> Any:
    """Large enough that what it hears matters."""
    for name, parameter in model.named_parameters():
        parameter.normal_(std=0.1 if name.endswith("bias") else 0.3)
    return model


def loaded_tiny_whisper() -> Any:
    """As load_base_model leaves it."""
    model = tiny_whisper()
    disable_dropout(model.config)
    allow_short_windows(model)
    return model


def tiny_extractor() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=2)


def save_tiny_whisper(folder: Path) -> Path:
    """A folder that model.path may name."""
    tiny_whisper().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tiny_extractor().save_pretrained(folder)
    return folder


def tiny_speech_processor(cache: Path, workers: int = 0, **audio: Any) -> SpeechProcessor:
    store = FeatureStore(cache / "features", tiny_extractor(), gigabytes=1.0, workers=workers)
    settings = AudioConfig(**audio)
    windows = Windows(POSITIONS * GRAIN, settings.window_step, lambda samples: samples // GRAIN)
    return SpeechProcessor(
        tokenizer=tiny_tokenizer(),
        windows=windows,
        max_tokens=96,
        whisper=True,
        start=None,
        store=store,
        audio=settings,
        progress=ProgressBar,
    )


def write_clip(path: Path, seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1) -> Path:
    """Noise, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels))
    soundfile.write(path, samples, rate)
    return path


def write_manifest(file: Path, rows: Sequence[tuple[str, str]], **columns: str) -> Path:
    """rows: (clip beside the manifest, sentence)."""
    lines = [
        json.dumps({"path": path, "sentence": sentence, **columns}, ensure_ascii=False)
        for path, sentence in rows
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_corpus(folder: Path, language: str, clips: int = 10, held: int = 4) -> dict[str, str]:
    """Clips of 0.3 to 1.9 s and their manifests; returns split -> manifest."""
    sentences = ["one fish", "two fish", "red", "blue fish swims", "old", "new fish here", "a car", "a star"]
    files = {}
    for split, first, count in (("train", 0, clips), ("validation", 100, held), ("test", 200, held)):
        rows = []
        for i in range(first, first + count):
            seconds = 0.3 + 0.4 * (i % 5)
            clip = write_clip(folder / "clips" / f"{language}-{i}.wav", seconds, seed=i)
            rows.append((f"clips/{clip.name}", f"{sentences[i % 8]} {language} {i}"))
        files[split] = str(
            write_manifest(folder / f"{language}.{split}.jsonl", rows, speaker=f"{language}-{split}")
        )
    return files
