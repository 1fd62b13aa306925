"""Tiny Whispers in the layouts of the published ones: configuration but for sizes, tokens, mel bins, files.

The tokens of text are bytes; those of languages, tasks and timestamps are Whisper's, in its order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from tests.speech import with_random_weights, write_clip

END, START = "<|endoftext|>", "<|startoftranscript|>"
TIMESTAMPS = tuple(f"<|{step * 0.02:.2f}|>" for step in range(1501))
SENTENCES = (
    "jedna ryba",
    "druh\u00e1 ryba",
    "\u201enov\u00e1\u201c ryba",
    "\u043d\u044d\u0433 \u0437\u0430\u0433\u0430\u0441",
    "auto",
)


@dataclass(frozen=True)
class Layout:
    """What differs between the published models."""

    path: str
    """Its name on the hub."""
    mel_bins: int = 80
    languages: int = 99
    encoder_layers: int = 2
    decoder_layers: int = 2
    dtype: str = "float32"
    silence: str = "<|nocaptions|>"
    """The token that stands for a clip without speech."""
    multilingual: bool = True


LAYOUTS = {
    "large": Layout("openai/whisper-large"),
    "large-v2": Layout("openai/whisper-large-v2"),
    "large-v3": Layout(
        "openai/whisper-large-v3", mel_bins=128, languages=100, dtype="float16", silence="<|nospeech|>"
    ),
    "turbo": Layout(
        "openai/whisper-large-v3-turbo",
        mel_bins=128,
        languages=100,
        encoder_layers=6,
        decoder_layers=4,
        dtype="float16",
        silence="<|nospeech|>",
    ),
    "distil": Layout(
        "distil-whisper/distil-large-v3",
        mel_bins=128,
        languages=100,
        encoder_layers=12,
        dtype="float16",
        silence="<|nospeech|>",
    ),
    "english": Layout("openai/whisper-tiny.en", silence="<|nospeech|>", multilingual=False),
}


def save_whisper(name: str, folder: Path) -> Path:
    """Write a layout's repository with random weights."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    core = _save_tokenizer(layout, folder)
    end, start = core.token_to_id(END), core.token_to_id(START)
    side = {"attention_heads": 4, "ffn_dim": 64, "layerdrop": 0.0}
    config = WhisperConfig(
        vocab_size=core.get_vocab_size(),
        num_mel_bins=layout.mel_bins,
        d_model=32,
        encoder_layers=layout.encoder_layers,
        decoder_layers=layout.decoder_layers,
        **{f"encoder_{key}": value for key, value in side.items()},
        **{f"decoder_{key}": value for key, value in side.items()},
        bos_token_id=end,
        eos_token_id=end,
        # as in large-v3, whose padding is another token than its tokenizer's
        pad_token_id=end - (layout.languages == 100),
        decoder_start_token_id=start,
        begin_suppress_tokens=[32, end],
        dtype=layout.dtype,
    )
    torch.manual_seed(0)
    model: Any = with_random_weights(WhisperForConditionalGeneration(config))
    model.to(getattr(torch, layout.dtype)).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=layout.mel_bins).save_pretrained(folder)
    generation = {
        "begin_suppress_tokens": [32, end],
        "bos_token_id": end,
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "is_multilingual": layout.multilingual,
        "max_length": 448,
        "no_timestamps_token_id": core.token_to_id("<|notimestamps|>"),
        "pad_token_id": end,
        "return_timestamps": False,
        "suppress_tokens": [],
    }
    if layout.multilingual:
        codes = list(LANGUAGES)[: layout.languages]
        generation["lang_to_id"] = {f"<|{code}|>": core.token_to_id(f"<|{code}|>") for code in codes}
        generation["task_to_id"] = {
            task: core.token_to_id(f"<|{task}|>") for task in ("transcribe", "translate")
        }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _save_tokenizer(layout: Layout, folder: Path) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[: layout.languages]]
    others = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", layout.silence]
    special = [END, START, *languages, *others, "<|notimestamps|>"]
    core.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    core.add_tokens([AddedToken(word, normalized=False) for word in TIMESTAMPS])
    core.save(str(folder / "tokenizer.json"))
    settings = {
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END),
        "add_prefix_space": False,
        "additional_special_tokens": special,
        "errors": "replace",
        "model_max_length": 1024,
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
        "tokenizer_class": "WhisperTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return core


def write_release(folder: Path, locales: Sequence[str], clips: int = 6) -> Path:
    """A release of Common Voice in the official layout; its clips are noise."""
    release = folder / "cv-corpus-22.0-2025-06-20"
    for number, locale in enumerate(locales):
        for split, count in (("train", clips), ("dev", 2), ("test", 2)):
            lines = ["client_id\tpath\tsentence_id\tsentence\tlocale"]
            for i in range(count):
                name = f"common_voice_{locale}_{split}_{i}.mp3"
                seed = 1000 * number + 100 * len(split) + i
                write_clip(release / locale / "clips" / name, 0.5 + 0.3 * (i % 3), seed=seed)
                sentence = f"{SENTENCES[i % len(SENTENCES)]} {split} {i}"
                lines.append("\t".join([f"{split}{i}", name, f"{seed}", sentence, locale]))
            (release / locale / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return release
