"""Mixed transcription equals the model alone, clip by clip, for every adapter and with beams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.data.audio.decode import check_clip
from flora_train.data.audio.features import ClipRef, FeatureStore
from flora_train.data.audio.speech_processor import GRAIN
from flora_train.evaluation.speech.transcribe import DecodedClip, Request, Transcriber
from tests.conftest import spec
from tests.speech import loaded_tiny_whisper, tiny_extractor, tiny_tokenizer, write_clip

MOST = 12


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    specs = [
        spec("flora", "a"),
        spec("lora", "a"),
        replace(spec("lora", "b"), parent_module="decoder"),
        spec("ia3", "b"),
    ]
    bank = AdapterBank.attach(loaded_tiny_whisper(), specs)
    generator = torch.Generator().manual_seed(1)
    for pool in bank.pools:  # adapters that do something
        pool.values.add_(0.3 * torch.randn(pool.values.shape, generator=generator))
    return bank


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[ClipRef]:
    folder = tmp_path_factory.mktemp("clips")
    files = [write_clip(folder / f"{i}.wav", 0.4 + 0.5 * (i % 3), seed=i) for i in range(5)]
    return [
        ClipRef(str(file), check_clip(str(file)).sha, GRAIN * 25 * (1 + 2 * (i % 2)))
        for i, file in enumerate(files)
    ]


def store_of(clips: list[ClipRef]) -> FeatureStore:
    return FeatureStore(Path(clips[0].path).parent / "features", tiny_extractor(), gigabytes=1.0, workers=0)


def requests_of(bank: AdapterBank, clips: list[ClipRef]) -> list[Request]:
    tokenizer = tiny_tokenizer()
    prompts = [
        tuple(
            tokenizer.convert_tokens_to_ids(
                ["<|startoftranscript|>", language, "<|transcribe|>", "<|notimestamps|>"]
            )
        )
        for language in ("<|cs|>", "<|hi|>")
    ]
    return [
        Request(adapter, clip, prompts[adapter % 2], bank.shares_encoding(adapter))
        for adapter in (BASE_ID, *range(len(bank.specs)))
        for clip in clips
    ]


def transcripts(
    bank: AdapterBank, clips: list[ClipRef], requests: list[Request], **options: Any
) -> list[DecodedClip]:
    found: dict[int, DecodedClip] = {}
    options = {"max_rows": 7, **options}
    writer = Transcriber(
        bank.model, tiny_tokenizer(), bank.routed, store=store_of(clips), max_new_tokens=MOST, **options
    )
    writer.run(requests, lambda one: found.setdefault(one.request, one) and None)
    return [found[i] for i in range(len(requests))]


@torch.no_grad()
def alone(bank: AdapterBank, clips: list[ClipRef], request: Request) -> list[int]:
    """Greedy, one clip, everything computed anew for every token."""
    tokenizer = tiny_tokenizer()
    features = torch.from_numpy(store_of(clips).get([request.clip])[0].copy()).float()[None]
    tokens: list[int] = []
    bank.model.eval()
    while len(tokens) < MOST:
        with bank.routed([request.adapter]):
            logits = bank.model(
                input_features=features, decoder_input_ids=torch.tensor([[*request.prompt, *tokens]])
            ).logits[0, -1]
        allowed = torch.full_like(logits, -torch.inf)
        allowed[: tokenizer.eos_token_id + 1] = 0
        tokens.append(int((logits + allowed).argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokens


def test_greedy_transcripts_in_a_mixed_batch_equal_those_of_each_clip_alone(
    bank: AdapterBank, clips: list[ClipRef]
) -> None:
    requests = requests_of(bank, clips)
    found = transcripts(bank, clips, requests)
    expected = [alone(bank, clips, request) for request in requests]
    tokenizer = tiny_tokenizer()
    for one, tokens in zip(found, expected, strict=True):
        if one.ended != "loop":
            assert one.text == tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert one.tokens == len(tokens)
    by_adapter = {request.adapter: found[i].text for i, request in enumerate(requests)}
    assert len(set(by_adapter.values())) > 2, "adapters that all say the same prove nothing"


def test_transcripts_do_not_depend_on_order_batch_size_or_neighbours(
    bank: AdapterBank, clips: list[ClipRef]
) -> None:
    requests = requests_of(bank, clips)
    whole = transcripts(bank, clips, requests, max_rows=64)
    assert [one.text for one in transcripts(bank, clips, requests, max_rows=1)] == [one.text for one in whole]
    backwards = transcripts(bank, clips, requests[::-1])[::-1]
    assert [one.text for one in backwards] == [one.text for one in whole]


@torch.no_grad()
def score(bank: AdapterBank, clips: list[ClipRef], request: Request, tokens: list[int]) -> float:
    """Log-probability a token, among the tokens that may be written."""
    tokenizer = tiny_tokenizer()
    features = torch.from_numpy(store_of(clips).get([request.clip])[0].copy()).float()[None]
    ids = torch.tensor([[*request.prompt, *tokens]])
    with bank.routed([request.adapter]):
        logits = bank.model(input_features=features, decoder_input_ids=ids).logits[
            0, len(request.prompt) - 1 : -1
        ]
    likely = logits[:, : tokenizer.eos_token_id + 1].log_softmax(-1)
    return float(likely.gather(1, torch.tensor(tokens)[:, None]).sum()) / len(tokens)


def test_beams_find_likelier_texts(bank: AdapterBank, clips: list[ClipRef]) -> None:
    requests = requests_of(bank, clips)
    wide = transcripts(bank, clips, requests, beams=4)
    assert [one.text for one in transcripts(bank, clips, requests, beams=4, max_rows=4)] == [
        one.text for one in wide
    ]
    tokenizer, better = tiny_tokenizer(), 0
    for request, one in zip(requests, wide, strict=True):
        greedy = alone(bank, clips, request)
        if one.ended == "end" and greedy[-1] == tokenizer.eos_token_id:
            tokens = [*tokenizer(one.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if tokenizer.decode(tokens[:-1]) == one.text:
                better += score(bank, clips, request, tokens) > score(bank, clips, request, greedy) + 1e-6
    assert [one.text for one in wide] != [one.text for one in transcripts(bank, clips, requests)]


def test_suppressed_and_special_tokens_are_never_written(bank: AdapterBank, clips: list[ClipRef]) -> None:
    tokenizer = tiny_tokenizer()
    requests = requests_of(bank, clips)
    writer = Transcriber(bank.model, tokenizer, bank.routed, store=store_of(clips), max_new_tokens=MOST)
    assert writer.never[tokenizer.eos_token_id + 1 :].all()
    assert not writer.never[: tokenizer.eos_token_id + 1].any()
    before = [one.text for one in transcripts(bank, clips, requests)]
    bank.model.generation_config.begin_suppress_tokens = [
        alone(bank, clips, request)[0] for request in requests
    ]
    try:
        after = [one.text for one in transcripts(bank, clips, requests)]
    finally:
        bank.model.generation_config.begin_suppress_tokens = None
    assert before != after
    assert before == [one.text for one in transcripts(bank, clips, requests)]
