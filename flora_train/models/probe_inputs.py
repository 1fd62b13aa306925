"""Inputs that a model is probed with: a few tokens that all differ, and for a speech model the features of noise."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flora_train.data.audio.decode import RATE
from flora_train.data.audio.features import extracted
from flora_train.models.loading import set_mode
from flora_train.models.speech_encoder import is_speech_model

SECONDS = 0.5
"""Of the noise that a speech model hears."""


def count_tokens(model: Any) -> int:
    """Token ids that the model can both read and predict: rows of its embedding and of its output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = [model.get_input_embeddings(), *([] if head is None else [head])]
    return min(int(table.weight.shape[0]) for table in tables)


def plain_tokens(model: Any, count: int, without: Collection[int] = ()) -> Tensor:
    """`count` token ids, int64 on the model's device, all different where the vocabulary allows it; none of `without`, and none
    with a meaning of its own (padding, end, image, ...)."""
    vocabulary = count_tokens(model)
    special = {*_special_ids(model.config), *without}
    free = [token for token in range(vocabulary) if token not in special] or list(range(vocabulary))
    step = max(1, len(free) // count)  # spread over the vocabulary: neighbours in it are often alike
    return torch.tensor([free[i * step % len(free)] for i in range(count)], device=device_of(model))


def _special_ids(config: Any) -> Iterator[int]:
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]
    for key, value in (item for part in parts for item in vars(part).items()):
        if "token_id" in key or "token_index" in key:
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def noise_features(extractor: Any) -> Tensor:
    """Features [1, ...] of SECONDS of noise, as the extractor makes them."""
    noise = np.random.default_rng(0).standard_normal(int(SECONDS * RATE)).astype(np.float32)
    return torch.from_numpy(extracted(extractor, noise)[None].astype(np.float32))


def feature_shape(config: Any) -> tuple[int, ...] | None:
    """The shape of one clip's features where the configuration says it; None where only an extractor knows it."""
    kind = getattr(config, "model_type", None)
    if kind == "whisper":
        return config.num_mel_bins, 2 * config.max_source_positions
    if kind == "moonshine":
        return (int(SECONDS * RATE),)
    if kind == "speech_to_text":
        return 64, config.input_feat_per_channel * config.input_channels
    return None


def probe_inputs(model: Any, rows: int, length: int, features: Tensor | None = None) -> dict[str, Tensor] | None:
    """A batch of `rows` rows of `length` tokens, all different, for `model(**inputs)`. features: [1, ...] of a clip, for a speech model;
    None: by its configuration. Returns None for a speech model whose features are not known."""
    tokens = plain_tokens(model, rows * length).view(rows, length)
    if not is_speech_model(model.config):
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return (
            {**inputs, "decoder_input_ids": tokens.roll(1, 1)} if getattr(model.config, "is_encoder_decoder", False) else inputs
        )
    shape = feature_shape(model.config) if features is None else tuple(features.shape[1:])
    if shape is None:
        return None
    first = next(model.parameters())
    heard = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
    return {model.main_input_name: heard, "decoder_input_ids": tokens}


@contextmanager
def preserved_state(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run a model meanwhile in evaluation (or training) mode, without checkpointing of activations; afterwards its modes and all
    generators are as they were."""
    modes = {module: module.training for module in model.modules()}
    recomputing = [module for module in modes if getattr(module, "gradient_checkpointing", False) is True]
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        set_mode(model, training)
        for module in recomputing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module in recomputing:
                module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def gradients_enabled(model: Any, every: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gradients flow as they do for adapters meanwhile: the embeddings of tokens (`every` embedding: an encoder may have its own) ask
    for them. Yields (ids, embeddings) of every call."""
    caught: list[tuple[Tensor, Tensor]] = []

    def ask(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output.requires_grad_(True).retain_grad()
        caught.append((args[0], output))
        return output.clone()  # some models change their embeddings in place, which no leaf allows

    tables = {model.get_input_embeddings(), *(module for module in model.modules() if every and isinstance(module, nn.Embedding))}
    handles = [table.register_forward_hook(ask) for table in tables]
    try:
        with torch.enable_grad():
            yield caught
    finally:
        for handle in handles:
            handle.remove()
