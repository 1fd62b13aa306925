"""The encoder of a speech model: windows of any length, and one encoding per clip for all rows whose adapters
do not change it."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from flora_train.data.audio.features import extracted
from flora_train.data.batch import MixedBatch

DISTILLED_LAYERS, LEAST_LAYERS = 2, 12
"""Layers of the decoder of distil-whisper's larger models, and the least number that such an encoder has. No
other published model has as few decoder layers beside as many encoder layers."""


def is_speech_model(model_config: Any) -> bool:
    """Whether this is the configuration of an encoder-decoder with speech input: Whisper, Moonshine,
    Speech2Text, ..."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    is_known = getattr(model_config, "model_type", None) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    return is_known and bool(getattr(model_config, "is_encoder_decoder", False))


def is_whisper(model_config: Any) -> bool:
    """Whether it is a Whisper, which has windows of 30 s and prompts of four tokens."""
    return getattr(model_config, "model_type", None) == "whisper"


def is_distilled(model_config: Any) -> bool:
    """Whether it is a Whisper with the short decoder of distil-whisper's models."""
    decoder, encoder = getattr(model_config, "decoder_layers", 0), getattr(model_config, "encoder_layers", 0)
    return is_whisper(model_config) and decoder == DISTILLED_LAYERS and encoder >= LEAST_LAYERS


def max_text_tokens(model_config: Any) -> int:
    """The most tokens that the decoder can read."""
    text = model_config.get_text_config(decoder=True)
    return int(getattr(text, "max_target_positions", None) or text.max_position_embeddings)


def count_positions(empty_model: Any, extractor: Any) -> Callable[[int], int]:
    """A function from the samples of a window to the positions of the encoder's output.

    Computed from shapes, on a model without weights (meta device).
    """

    @cache
    @torch.no_grad()
    def count(samples: int) -> int:
        # Noise, because some extractors divide by the variance.
        noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
        shape = extracted(extractor, noise).shape
        return int(encode(empty_model, torch.empty((1, *shape), device="meta")).shape[1])

    return count


def encoder_name(model: Any) -> str | None:
    """The module name of an encoder-decoder's encoder; None for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()
    return next(name for name, module in model.named_modules() if module is encoder)


def allow_short_windows(model: Any) -> None:
    """Let Whisper's encoder accept fewer frames than its longest window, which it refuses by default.

    Position i keeps its embedding, so that the encoding of a full window does not change.
    """
    encoder = model.get_encoder()
    # A copy, because the saved and exported configuration states the longest window.
    encoder.config = copy(encoder.config)
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]

    def set_window(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features: Tensor = args[0] if args else kwargs["input_features"]
        encoder.config.max_source_positions = features.shape[-1] // stride

    def truncate(module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        return embeddings[: encoder.config.max_source_positions]

    encoder.register_forward_pre_hook(set_window, with_kwargs=True)
    encoder.embed_positions.register_forward_hook(truncate)


def model_inputs(model: Any, batch: MixedBatch) -> dict[str, Tensor | BaseModelOutput]:
    """The arguments of the model's forward.

    Where the batch holds each clip once (`clips`) and no row's adapter changes the encoder, every clip is
    encoded once, without gradients, by the frozen base; otherwise features are repeated for each row.
    """
    inputs = dict(batch.inputs)
    name = model.main_input_name
    if name in inputs and inputs[name].is_floating_point():
        inputs[name] = to_base_dtype(model, inputs[name])
    if batch.clips is None:
        return inputs
    features = inputs.pop(name)
    if not all(row.shares_encoding for row in batch.rows):
        return {**inputs, name: features[batch.clips]}
    return {**inputs, "encoder_outputs": as_encoder_outputs(encode(model, features)[batch.clips])}


def as_encoder_outputs(hidden: Tensor) -> BaseModelOutput:
    """States [B, positions, d] in the form that decoders accept, without a mask."""
    outputs = BaseModelOutput(last_hidden_state=hidden)
    outputs.attention_mask = None  # read by some models
    return outputs


def to_base_dtype(model: Any, features: Tensor) -> Tensor:
    """Features, which are float16 or float32, in the dtype of the base's weights."""
    return features.to(next(model.parameters()).dtype)


@torch.no_grad()
def encode(model: Any, features: Tensor) -> Tensor:
    """Features [B, ...] of any floating dtype -> [B, positions, d].

    The rows must be those of the current routing, or no adapter in use may have a target in the encoder.
    """
    hidden: Tensor = model.get_encoder()(to_base_dtype(model, features)).last_hidden_state
    return hidden
