"""`recipe=common_voice model.path=NAME` on the layouts of the published Whispers, without a further key.

Each is tiny and has random weights (tests/whisper_layouts.py); clips are noise and lengths are short.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSpeechSeq2Seq
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.config.speech_schema import SpeechConfig
from flora_train.data.audio.speech_processor import language_tokens
from flora_train.models.loading import is_english_only, load_tokenizer
from flora_train.models.speech_encoder import is_distilled
from flora_train.run_context import load_run
from tests.e2e.conftest import Launch
from tests.forked import ROOT
from tests.speech import tiny_speech_processor
from tests.whisper_layouts import LAYOUTS, save_whisper, write_release

TASKS = ("cs", "mn")
FAMILIES = ("flora", "flora_rank4", "lora", "lora_rank4", "ia3")
MULTILINGUAL = [name for name, layout in LAYOUTS.items() if layout.multilingual]
EQUAL = 1e-4
"""Largest difference of logits, whose sums have other orders with other numbers of rows."""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"), TASKS)


def words_of(base: Path, release: Path, folder: Path) -> list[str]:
    """The recipe's command with a local release, two languages and short lengths."""
    return [
        "recipe=common_voice",
        f"model.path={base}",
        f"tasks.ar.train.common_voice={release}",
        f"output_dir={folder}",
        *(f"adapters.{family}.tasks=[{','.join(TASKS)}]" for family in FAMILIES),
        "training.steps=2",
        "training.tokens_per_step=12000",
        "training.tokens_per_microbatch=1600",
        "training.max_length=96",
        "mixture.examples_per_draw=2",
        "evaluation.interval=2",
        "evaluation.max_examples=2",
        "evaluation.max_new_tokens=6",
        "audio.window_step=1",
        "audio.workers=0",
        "num_threads=1",
    ]


@pytest.mark.parametrize("name", MULTILINGUAL)
@pytest.mark.quick("large-v3")
def test_recipe_trains_and_plain_peft_loads_what_it_exports(
    name: str, release: Path, launch: Launch, tmp_path: Path
) -> None:
    base, folder = save_whisper(name, tmp_path / LAYOUTS[name].path.rpartition("/")[2]), tmp_path / "run"
    done = launch(*words_of(base, release, folder))
    assert done.returncode == 0, done.stderr
    assert ("distil-whisper trained on English alone" in done.stderr) == (name == "distil")
    report = json.loads((folder / "eval" / "report.json").read_text())
    assert [part["task"] for part in report["speech"]["languages"]] == list(TASKS)
    context, best = load_run(str(folder))
    assert len(best) == len(TASKS) * len(FAMILIES)
    mel_bins, tokenizer = LAYOUTS[name].mel_bins, context.tokenizer
    features = torch.randn(1, mel_bins, 3000, generator=torch.Generator().manual_seed(0))
    prompt = ["<|startoftranscript|>", "<|mn|>", "<|transcribe|>", "<|notimestamps|>"]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(prompt)])
    inputs: dict[str, Any] = {"input_features": features, "decoder_input_ids": ids}
    plain = AutoModelForSpeechSeq2Seq.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        before = plain(**inputs).logits
        for family in FAMILIES:
            with context.bank.routed([f"mn-{family}"]):
                ours = context.model(**inputs).logits
            adapter = folder / "adapters" / f"mn-{family}"
            loaded = PeftModel.from_pretrained(plain, adapter).eval()
            theirs = loaded(**inputs).logits
            plain = loaded.unload()
            assert (ours - theirs).abs().max() <= EQUAL * ours.abs().max()
            assert (ours - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", MULTILINGUAL)
def test_language_tokens_of_both_vocabularies(name: str, tmp_path: Path) -> None:
    """large-v3 added Cantonese behind the others, which moved all later tokens by one."""
    tokenizer = load_tokenizer(ModelConfig(path=str(save_whisper(name, tmp_path / "base"))))
    layout, vocabulary = LAYOUTS[name], tokenizer.get_vocab()
    codes = list(LANGUAGES)[: layout.languages]
    assert language_tokens(vocabulary) == sorted(f"<|{code}|>" for code in codes)
    assert ("yue" in codes) == (layout.languages == 100)
    processor = tiny_speech_processor(tmp_path)
    processor = type(processor)(**{**vars(processor), "tokenizer": tokenizer})
    start = vocabulary["<|startoftranscript|>"]
    for code in codes:
        prompt = processor.prompt(SpeechConfig(language=code), "tasks.x")
        assert prompt[:2] == [start, start + 1 + codes.index(code)]
        shift = len(codes) + 1
        assert [token - start for token in prompt[2:]] == [shift + 1, shift + 5]
    if layout.languages == 99:
        with pytest.raises(
            UserError, match=r"speech\.language = 'yue': is a language that this model has no"
        ):
            processor.prompt(SpeechConfig(language="yue"), "tasks.x")


def test_english_only_model_is_refused_in_one_line(release: Path, launch: Launch, tmp_path: Path) -> None:
    """Its tokenizer has the tokens of languages, too."""
    base = save_whisper("english", tmp_path / "whisper-tiny.en")
    assert "<|cs|>" in load_tokenizer(ModelConfig(path=str(base))).get_vocab()
    done = launch(*words_of(base, release, tmp_path / "run"))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert line.startswith("error: model.path = ")
    assert "is an English-only Whisper, which was trained" in line
    assert line.endswith(f"use {tmp_path / 'whisper-tiny'}")


@pytest.mark.parametrize(
    ("vocabulary", "is_multilingual", "english"),
    [
        (51_864, None, True),
        (51_864, False, True),
        (51_865, None, False),
        (51_866, None, False),
        (51_865, False, False),
        (300, False, True),
        (300, None, False),
    ],
)
def test_english_only_models_by_their_files(
    vocabulary: int, is_multilingual: bool | None, english: bool, tmp_path: Path
) -> None:
    if is_multilingual is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"is_multilingual": is_multilingual}))
    model_config = SimpleNamespace(model_type="whisper", vocab_size=vocabulary)
    assert is_english_only(ModelConfig(path=str(tmp_path)), model_config) == english


@pytest.mark.parametrize(
    ("encoder", "decoder", "distilled"),
    [(32, 2, True), (24, 2, True), (32, 4, False), (32, 32, False), (4, 4, False), (2, 2, False)],
)
def test_distilled_layout(encoder: int, decoder: int, distilled: bool) -> None:
    config = SimpleNamespace(model_type="whisper", encoder_layers=encoder, decoder_layers=decoder)
    assert is_distilled(config) == distilled


@pytest.mark.parametrize("name", [name for name in MULTILINGUAL if name != "large"])
def test_recipe_names_the_base(name: str) -> None:
    assert LAYOUTS[name].path in (ROOT / "recipes" / "common_voice.yaml").read_text(encoding="utf-8")
