"""Inputs for probing a model: a few different tokens, and for a speech model the features of noise."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flora_train.data.audio.decode import RATE
from flora_train.data.audio.features import extracted
from flora_train.models.loading import config_parts, set_mode
from flora_train.models.speech_encoder import is_speech_model

NOISE_SECONDS = 0.5
"""Length of the noise that a speech model gets."""


def count_tokens(model: Any) -> int:
    """The number of token ids that the model can both read and predict: rows of its embedding and of its
    output head."""
    tables = [model.get_input_embeddings()]
    if hasattr(model, "get_output_embeddings"):
        tables.append(model.get_output_embeddings())
    return min(int(table.weight.shape[0]) for table in tables if table is not None)


def plain_tokens(model: Any, count: int, without: Collection[int] = ()) -> Tensor:
    """`count` token ids, int64 on the model's device, all different if the vocabulary is large enough.

    None of them is in `without` or special (padding, end, image, ...).
    """
    vocabulary = count_tokens(model)
    excluded = {*_special_ids(model.config), *without}
    allowed = [token for token in range(vocabulary) if token not in excluded] or list(range(vocabulary))
    # Spread over the vocabulary, because neighbours are often similar.
    step = max(1, len(allowed) // count)
    return torch.tensor([allowed[i * step % len(allowed)] for i in range(count)], device=device_of(model))


def _special_ids(config: Any) -> Iterator[int]:
    for part in config_parts(config):
        for key, value in vars(part).items():
            if "token_id" in key or "token_index" in key:
                ids = value if isinstance(value, list) else [value]
                yield from (id_ for id_ in ids if isinstance(id_, int))


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def noise_features(extractor: Any) -> Tensor:
    """Features [1, ...] of NOISE_SECONDS of noise."""
    noise = np.random.default_rng(0).standard_normal(int(NOISE_SECONDS * RATE)).astype(np.float32)
    return torch.from_numpy(extracted(extractor, noise)[None].astype(np.float32))


def feature_shape(config: Any) -> tuple[int, ...] | None:
    """The shape of one clip's features if the configuration determines it; None if only an extractor does."""
    model_type = getattr(config, "model_type", None)
    if model_type == "whisper":
        return config.num_mel_bins, 2 * config.max_source_positions
    if model_type == "moonshine":
        return (int(NOISE_SECONDS * RATE),)
    if model_type == "speech_to_text":
        return 64, config.input_feat_per_channel * config.input_channels
    return None


def probe_inputs(
    model: Any, rows: int, length: int, features: Tensor | None = None
) -> dict[str, Tensor] | None:
    """A batch of `rows` rows of `length` tokens, all different, for `model(**inputs)`.

    features: [1, ...] of a clip, for a speech model; None: their shape follows from the configuration.
    Returns None for a speech model whose shape of features is unknown.
    """
    tokens = plain_tokens(model, rows * length).view(rows, length)
    if not is_speech_model(model.config):
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = tokens.roll(1, 1)
        return inputs
    shape = feature_shape(model.config) if features is None else tuple(features.shape[1:])
    if shape is None:
        return None
    first = next(model.parameters())
    noise = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0))
    return {model.main_input_name: noise.to(first.device, first.dtype), "decoder_input_ids": tokens}


@contextmanager
def preserved_state(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run a model in evaluation (or training) mode without activation checkpointing.

    Afterwards its modes and all random generators are as before.
    """
    modes = {module: module.training for module in model.modules()}
    checkpointing = [module for module in modes if getattr(module, "gradient_checkpointing", False) is True]
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        set_mode(model, training)
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module in checkpointing:
                module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def gradients_enabled(model: Any, every: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gradients flow as they do for adapters: the token embeddings require grad.

    every: all embeddings do, because an encoder may have its own. Yields (ids, embeddings) of every call.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output.requires_grad_(True).retain_grad()
        calls.append((args[0], output))
        # Cloned, because some models change their embeddings in place, which autograd forbids for a leaf.
        return output.clone()

    tables = {model.get_input_embeddings()}
    if every:
        tables |= {module for module in model.modules() if isinstance(module, nn.Embedding)}
    handles = [table.register_forward_hook(require_grad) for table in tables]
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()
