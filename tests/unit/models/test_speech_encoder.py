"""Short windows are encoded as the beginning of long ones, and a clip once for all rows that share it."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.model_schema import ModelConfig
from flora_train.data.batch import MixedBatch, Row
from flora_train.models.loading import empty_model, load_base_model
from flora_train.models.speech_encoder import (
    allow_short_windows,
    count_positions,
    model_inputs,
    to_base_dtype,
)
from flora_train.training.loss import RowLosses
from tests.conftest import spec
from tests.other_speech import KINDS, extractor_of, loaded_tiny, save_tiny
from tests.speech import MEL_BINS, POSITIONS, loaded_tiny_whisper, save_tiny_whisper, tiny_whisper

WINDOW = 30


def batch_of(adapters: list[int], bank: AdapterBank, window: int = WINDOW) -> MixedBatch:
    """Two clips, heard in turn by all these adapters."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, MEL_BINS, 2 * window, generator=generator)
    labels = torch.randint(0, 200, (len(adapters), 5), generator=generator)
    rows = tuple(
        Row(a, "t", i % 2, window + 5, window, bank.shares_encoding(a)) for i, a in enumerate(adapters)
    )
    inputs = {"input_features": features, "decoder_input_ids": labels.roll(1, 1)}
    return MixedBatch(
        inputs, labels, torch.tensor(adapters), rows, torch.tensor([i % 2 for i in range(len(adapters))])
    )


@torch.no_grad()
def test_longest_window_is_encoded_as_before() -> None:
    before, after = tiny_whisper().eval(), tiny_whisper().eval()
    allow_short_windows(after)
    features = torch.randn(2, MEL_BINS, 2 * POSITIONS, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3]] * 2)
    whole = before(input_features=features, decoder_input_ids=ids).logits
    assert torch.equal(after(input_features=features, decoder_input_ids=ids).logits, whole)
    with pytest.raises(ValueError, match="mel input features"):
        before(input_features=features[..., :60], decoder_input_ids=ids)
    assert after(input_features=features[..., :60], decoder_input_ids=ids).logits.shape == whole.shape
    assert torch.equal(after(input_features=features, decoder_input_ids=ids).logits, whole)
    assert after.config.max_source_positions == POSITIONS


@torch.no_grad()
def test_the_models_own_specaugment_is_off(tmp_path: Path, auto_dtype: torch.dtype) -> None:
    config = ModelConfig(path=str(save_tiny_whisper(tmp_path)))
    model: Any = load_base_model(config, torch.device("cpu")).train()
    features = to_base_dtype(model, torch.randn(2, MEL_BINS, 2 * POSITIONS))
    assert features.dtype == auto_dtype
    inputs = {"input_features": features, "decoder_input_ids": torch.tensor([[1, 2]] * 2)}
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("shared", [True, False])
def test_encoder_takes_features_of_any_type_for_a_base_of_any_type(
    tmp_path: Path, auto_dtype: torch.dtype, shared: bool
) -> None:
    model: Any = load_base_model(ModelConfig(path=str(save_tiny_whisper(tmp_path))), torch.device("cpu"))
    bank = AdapterBank.attach(model, [spec("flora", "a"), spec("lora", "b")])
    batch, row_losses, losses = batch_of([0, 1], bank), RowLosses(model), []
    for of_features in (torch.float32, torch.float16, torch.bfloat16):
        inputs = {**batch.inputs, "input_features": batch.inputs["input_features"].bfloat16().to(of_features)}
        bank.route(batch.adapter_ids)
        losses.append(
            row_losses(replace(batch, inputs=inputs, clips=batch.clips if shared else None)).detach()
        )
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_an_encoder_whose_weights_are_saved_in_half_precision_are_counted(
    kind: str, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path)
    expected = count_positions(empty_model(ModelConfig(path=str(tmp_path))), extractor_of(kind))(16000)
    loaded_tiny(kind).bfloat16().save_pretrained(tmp_path)
    assert (
        count_positions(empty_model(ModelConfig(path=str(tmp_path))), extractor_of(kind))(16000) == expected
    )


def test_saved_encoder_records_the_longest_window(tmp_path: Path) -> None:
    model = tiny_whisper()
    allow_short_windows(model)
    with torch.no_grad():
        model.get_encoder()(torch.zeros(1, MEL_BINS, 20))
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.max_source_positions == POSITIONS


def test_adapters_of_the_decoder_share_an_encoding() -> None:
    model = loaded_tiny_whisper()
    decoder = [replace(spec(method, "a"), parent_module="decoder") for method in ("flora", "lora", "ia3")]
    bank = AdapterBank.attach(model, [*decoder, spec("lora", "b")])
    assert [bank.shares_encoding(a) for a in (BASE_ID, 0, 1, 2, 3)] == [True, True, True, True, False]
    encoded: list[torch.Size] = []
    model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append((args[0] if args else kwargs["input_features"]).shape),
        with_kwargs=True,
    )
    row_losses = RowLosses(model)
    generator = torch.Generator().manual_seed(2)
    for pool in bank.pools:
        pool.values.add_(0.1 * torch.randn(pool.values.shape, generator=generator))
    together = batch_of([0, 0, 1, 1, 2, 2], bank)
    bank.route(together.adapter_ids)
    shared = row_losses(together)
    assert encoded == [torch.Size([2, MEL_BINS, 2 * WINDOW])]
    apart = replace(together, rows=tuple(replace(row, shares_encoding=False) for row in together.rows))
    assert "encoder_outputs" in model_inputs(model, together)
    bank.route(apart.adapter_ids)
    torch.testing.assert_close(shared, row_losses(apart))
    assert encoded[-1][0] == 6
    shared.sum().backward()
    assert min(float(bank.gradient_row(a).abs().max()) for a in (0, 1, 2)) > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_reaches_adapters_in_the_encoder(reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model = loaded_tiny_whisper()
        bank = AdapterBank.attach(model, [spec("flora", "a"), spec("lora", "b")])
        generator = torch.Generator().manual_seed(2)
        for pool in bank.pools:
            pool.values.add_(0.1 * torch.randn(pool.values.shape, generator=generator))
        row_losses = RowLosses(model)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        batch = batch_of([0, 0, 1], bank)
        bank.route(batch.adapter_ids)
        row_losses(batch).sum().backward()
        gradients.append([bank.gradient_row(a).clone() for a in (0, 1)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)
    for adapter in (0, 1):
        for name, params in bank.location[adapter][0].layout.items():
            start, size = (
                min(first for first, _ in params.values()),
                sum(prod(shape) for _, shape in params.values()),
            )
            assert ".encoder." not in name or gradients[1][adapter][start : start + size].abs().max() > 0
