"""Tiny encoder-decoders of speech with random weights: Moonshine (waveform input) and Speech2Text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    PreTrainedTokenizerFast,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Speech2TextForConditionalGeneration,
    Wav2Vec2FeatureExtractor,
)

from flora_train.config.speech_schema import AudioConfig
from flora_train.data.audio.decode import RATE
from flora_train.data.audio.features import FeatureStore
from flora_train.data.audio.speech_processor import SpeechProcessor, Windows
from flora_train.models.loading import disable_dropout
from flora_train.models.speech_encoder import count_positions
from flora_train.runtime.progress import ProgressBar
from tests.speech import tiny_tokenizer, with_random_weights

KINDS = ("moonshine", "speech_to_text")
BINS = 16


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and an end token: nothing of Whisper's."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    kept = PreTrainedTokenizerFast(
        tokenizer_object=type(backend).from_str(backend.to_str().replace("<|notimestamps|>", "<other>"))
    )
    kept.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|startoftranscript|>"})
    return kept


def configuration(kind: str) -> Any:
    tokenizer = plain_tokenizer()
    shared = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.convert_tokens_to_ids("<|en|>"),
    }
    if kind == "moonshine":
        return MoonshineConfig(
            **shared,
            hidden_size=32,
            intermediate_size=48,
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
        )
    return Speech2TextConfig(
        **shared,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        conv_channels=32,
        input_feat_per_channel=BINS,
        max_target_positions=300,
        dropout=0.1,
    )


def model_class(kind: str) -> Any:
    return MoonshineForConditionalGeneration if kind == "moonshine" else Speech2TextForConditionalGeneration


def loaded_tiny(kind: str) -> Any:
    """The same at every call, as load_base_model leaves it."""
    torch.manual_seed(0)
    config = configuration(kind)
    disable_dropout(config)
    return with_random_weights(model_class(kind)(config))


def extractor_of(kind: str) -> Any:
    if kind == "moonshine":
        return Wav2Vec2FeatureExtractor(do_normalize=False)
    return Speech2TextFeatureExtractor(feature_size=BINS, num_mel_bins=BINS)


def speech_processor_of(kind: str, cache: Path, window_step: float) -> SpeechProcessor:
    with torch.device("meta"):
        empty = model_class(kind)(configuration(kind))
    extractor = extractor_of(kind)
    store = FeatureStore(cache / f"features {kind}", extractor, gigabytes=1.0, workers=0)
    windows, start = (
        Windows(2 * RATE, window_step, count_positions(empty, extractor)),
        empty.config.decoder_start_token_id,
    )
    return SpeechProcessor(
        tokenizer=plain_tokenizer(),
        windows=windows,
        max_tokens=96,
        whisper=False,
        start=start,
        store=store,
        audio=AudioConfig(window_step=window_step),
        progress=ProgressBar,
    )


def save_tiny(kind: str, folder: Path) -> Path:
    """A folder that model.path may name."""
    loaded_tiny(kind).save_pretrained(folder)
    plain_tokenizer().save_pretrained(folder)
    extractor_of(kind).save_pretrained(folder)
    return folder
