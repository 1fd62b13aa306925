"""Encoder-decoders other than Whisper: mixed batches give the transcripts of transformers' generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import UserError
from flora_train.config.speech_schema import SpeechConfig
from flora_train.data.audio.decode import RATE, check_clip
from flora_train.data.audio.features import ClipRef, input_name
from flora_train.evaluation.speech.transcribe import DecodedClip, Request, Transcriber
from tests.conftest import spec
from tests.other_speech import KINDS, loaded_tiny, speech_processor_of
from tests.speech import write_clip

MOST = 10


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_mixed_transcripts_are_those_of_generate(kind: str, tmp_path: Path) -> None:
    specs = [
        spec("flora", "a"),
        spec("lora", "a"),
        replace(spec("lora", "b"), parent_module="decoder"),
        spec("ia3", "b"),
    ]
    bank, speech_processor = (
        AdapterBank.attach(loaded_tiny(kind), specs),
        speech_processor_of(kind, tmp_path, window_step=0.5),
    )
    for pool in bank.pools:
        pool.values.add_(0.3 * torch.randn(pool.values.shape, generator=torch.Generator().manual_seed(1)))
    files = [str(write_clip(tmp_path / f"{i}.wav", 0.4 + 0.5 * i, seed=i)) for i in range(3)]
    clips = [
        ClipRef(file, check_clip(file).sha, speech_processor.windows.samples(0.4 + 0.5 * i))
        for i, file in enumerate(files)
    ]
    prompt = tuple(speech_processor.prompt(SpeechConfig(language="en"), "tasks.a"))
    requests = [
        Request(adapter, clip, prompt, bank.shares_encoding(adapter))
        for adapter in (BASE_ID, *range(len(specs)))
        for clip in clips
    ]
    found: dict[int, DecodedClip] = {}
    writer = Transcriber(
        bank.model,
        speech_processor.tokenizer,
        bank.routed,
        store=speech_processor.store,
        max_new_tokens=MOST,
        max_rows=7,
    )
    writer.run(requests, lambda one: found.setdefault(one.request, one) and None)

    tokenizer, model = speech_processor.tokenizer, bank.model.eval()
    special = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    for i, request in enumerate(requests):
        features = torch.from_numpy(speech_processor.store.get([request.clip])[0].copy()).float()[None]
        inputs = {
            input_name(speech_processor.store.extractor): features,
            "decoder_input_ids": torch.tensor([prompt]),
        }
        with bank.routed([request.adapter]):
            written = model.generate(
                **inputs, max_new_tokens=MOST, do_sample=False, num_beams=1, suppress_tokens=special
            )[0]
        tokens = written[len(prompt) :].tolist()
        assert (
            found[i].ended == "loop"
            or found[i].text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
        )
    assert len({found[i].text for i in range(len(requests))}) > len(clips), (
        "adapters that all say the same prove nothing"
    )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_positions_of_a_window_are_those_of_the_encoder(kind: str, tmp_path: Path) -> None:
    speech_processor, model = speech_processor_of(kind, tmp_path, window_step=0.5), loaded_tiny(kind).eval()
    for seconds in (0.3, 1.2):
        clip = write_clip(tmp_path / f"{seconds}.wav", seconds)
        samples = speech_processor.windows.samples(seconds)
        assert samples == {0.3: RATE // 2, 1.2: RATE * 3 // 2}[seconds]
        features = torch.from_numpy(
            speech_processor.store.get([ClipRef(str(clip), check_clip(str(clip)).sha, samples)])[0].copy()
        ).float()
        assert model.get_encoder()(features[None]).last_hidden_state.shape[
            1
        ] == speech_processor.windows.positions(samples)


def test_prompt_is_configured_or_the_start_token(tmp_path: Path) -> None:
    speech_processor = speech_processor_of("moonshine", tmp_path, window_step=0.5)
    vocabulary = speech_processor.tokenizer.get_vocab()
    assert speech_processor.prompt(SpeechConfig(language="cs"), "tasks.a") == [vocabulary["<|en|>"]]
    assert speech_processor.prompt(SpeechConfig(language="cs", prompt=["<|cs|>", "<|hi|>"]), "k") == [
        vocabulary["<|cs|>"],
        vocabulary["<|hi|>"],
    ]
    with pytest.raises(
        UserError, match=r"tasks\.a\.speech\.prompt = '<\|cz\|>': is not a token of this model\..*<\|cs\|>"
    ):
        speech_processor.prompt(SpeechConfig(language="cs", prompt=["<|cz|>"]), "tasks.a")
    with pytest.raises(UserError, match=r"tasks\.a\.speech\.token.*speech\.prompt"):
        speech_processor.prompt(SpeechConfig(language="cs", token="<|cs|>"), "tasks.a")
    with pytest.raises(UserError, match=r"tasks\.a\.speech\.prompt.*does not say its start token"):
        replace(speech_processor, start=None).prompt(SpeechConfig(language="cs"), "tasks.a")
    assert speech_processor.tokens([5], "ab")[1] == vocabulary["a"]
