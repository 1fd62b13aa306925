"""What does a speech model's encoder hear? Windows of any length, and a clip once for all rows whose adapters leave it as it is."""

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


def is_speech_model(model_config: Any) -> bool:
    """Whether this configuration is of an encoder-decoder that hears speech: Whisper, Moonshine, Speech2Text, ..."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

    known = getattr(model_config, "model_type", None) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
    return known and bool(getattr(model_config, "is_encoder_decoder", False))


def is_whisper(model_config: Any) -> bool:
    """Whether it is a Whisper: 30 s windows, and prompts of four tokens."""
    return getattr(model_config, "model_type", None) == "whisper"


def longest_text(model_config: Any) -> int:
    """Tokens that the decoder can read."""
    text = model_config.get_text_config(decoder=True)
    return int(getattr(text, "max_target_positions", None) or text.max_position_embeddings)


def count_positions(empty_model: Any, extractor: Any) -> Callable[[int], int]:
    """Samples of a window -> positions of the encoder's output: from shapes alone, on a model that holds no numbers (meta device)."""

    @cache
    @torch.no_grad()
    def count(samples: int) -> int:
        noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32)  # some extractors divide by what varies
        shape = extracted(extractor, noise).shape
        return int(encode(empty_model, torch.empty((1, *shape), device="meta")).shape[1])

    return count


def encoder_name(model: Any) -> str | None:
    """The module name of an encoder-decoder's encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()
    return next(name for name, module in model.named_modules() if module is encoder)


def take_short_windows(model: Any) -> None:
    """Let Whisper's encoder hear fewer frames than its longest window: as it is, it refuses them. Position i keeps its embedding, so
    that a full window gives what it gave."""
    encoder = model.get_encoder()
    encoder.config = copy(encoder.config)  # its own: what is saved and exported says the longest window
    stride = encoder.conv1.stride[0] * encoder.conv2.stride[0]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features: Tensor = args[0] if args else kwargs["input_features"]
        encoder.config.max_source_positions = features.shape[-1] // stride

    def cut(module: nn.Module, args: tuple[Any, ...], embeddings: Tensor) -> Tensor:
        return embeddings[: encoder.config.max_source_positions]

    encoder.register_forward_pre_hook(before, with_kwargs=True)
    encoder.embed_positions.register_forward_hook(cut)


def inputs_of(model: Any, batch: MixedBatch) -> dict[str, Any]:
    """What the model is called with. Where the batch holds each clip once (`clips`) and its rows' adapters leave the encoder as it
    is, every clip is encoded once, without gradients, by the frozen base; else features are repeated for each row."""
    inputs = dict(batch.inputs)
    name = model.main_input_name
    if name in inputs and inputs[name].is_floating_point():
        inputs[name] = as_base(model, inputs[name])
    if batch.clips is None:
        return inputs
    features = inputs.pop(name)
    if not all(row.shares_encoding for row in batch.rows):
        return {**inputs, name: features[batch.clips]}
    return {**inputs, "encoder_outputs": as_outputs(encode(model, features)[batch.clips])}


def as_outputs(hidden: Tensor) -> BaseModelOutput:
    """States [B, positions, d] as decoders take them; all are heard, there is no mask."""
    outputs = BaseModelOutput(last_hidden_state=hidden)
    outputs.attention_mask = None  # some models look for one here
    return outputs


def as_base(model: Any, features: Tensor) -> Tensor:
    """Features in the type of the base's weights: they come in float16 or float32, whatever the base is in."""
    return features.to(next(model.parameters()).dtype)


@torch.no_grad()
def encode(model: Any, features: Tensor) -> Tensor:
    """Features [B, ...] of any floating type -> [B, positions, d]. Rows must be those that are routed, or rows of adapters that no
    encoder layer has."""
    hidden: Tensor = model.get_encoder()(as_base(model, features)).last_hidden_state
    return hidden
