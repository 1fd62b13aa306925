"""Encoders (BERT and others that read in both directions) and the parts of a model that make a head."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

POOLER = "pooler"
"""Name of the module inside an encoder that reads its first token. No other layer reads what it makes."""


def is_encoder(model_config: Any) -> bool:
    """Whether this is the configuration of a model that reads in both directions and predicts no next token.

    BERT and its relatives are decoders where their configuration says is_decoder.
    """
    from transformers.models.auto import modeling_auto as auto

    if getattr(model_config, "is_encoder_decoder", False) or getattr(model_config, "is_decoder", False):
        return False
    model_type = getattr(model_config, "model_type", None)
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return True
    classifies = (
        model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        or model_type in auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    )
    remote: Mapping[str, str] = getattr(model_config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in remote:
        return False
    return model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        classifies or "AutoModelForSequenceClassification" in remote
    )


def encoder_class(model_config: Any) -> Any:
    """The auto class that an encoder is loaded with: it has the encoder and everything that a head may
    need."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
    from transformers.models.auto import modeling_auto as auto

    remote: Mapping[str, str] = getattr(model_config, "auto_map", None) or {}
    if (
        model_config.model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        or "AutoModelForSequenceClassification" in remote
    ):
        return AutoModelForSequenceClassification
    return AutoModelForTokenClassification


def body_prefix(model: Any) -> str:
    """What the names of the modules in the model's body (the model without its head) begin with."""
    body: nn.Module = model.base_model
    if body is model:
        return ""
    return next(f"{name}." for name, module in model.named_modules() if module is body)


def head_names(model: Any) -> frozenset[str]:
    """The names of the modules of an encoder that are parts of its head: what is outside of the body, and the
    pooler. Empty for other models."""
    if not is_encoder(getattr(model, "config", None)):
        return frozenset()
    prefix = body_prefix(model)
    names = set()
    for name, _ in model.named_modules():
        in_body = name.startswith(prefix) or name == prefix[:-1]
        if name and (not in_body or POOLER in name.split(".")):
            names.add(name)
    return frozenset(names)


def reads_token_types(model: Any) -> bool:
    """Whether the model has an embedding for the type of a token, of which there are two or more."""
    reads = "token_type_ids" in signature(model.base_model.forward).parameters
    return reads and getattr(model.config, "type_vocab_size", 2) > 1


def new_parameters(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that the checkpoint did not contain, which a head brings along. Of a model
    that was not loaded, all those outside of its body."""
    recorded: frozenset[str] | None = getattr(model, "_flora_new_parameters", None)
    if recorded is not None:
        return recorded
    prefix = body_prefix(model)
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(prefix))


def record_new_parameters(model: nn.Module, names: frozenset[str]) -> None:
    """Remember which parameters the checkpoint did not contain, and set them to 0: what transformers
    initialised them with differs at every loading."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameters[name].data.zero_()
    model._flora_new_parameters = names  # type: ignore[assignment]
