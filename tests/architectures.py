"""Every supported architecture as a tiny random-weight model, and what a batch of tokens means to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
)

from flora_train.models.loading import disable_dropout

VOCABULARY = 97
MEL_BINS, FRAMES = 8, 24

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED),
    "gemma": ("Gemma", GROUPED),
    "mistral": ("Mistral", GROUPED),
    "gpt2": ("GPT-2", GPT2_SIZES),
    "gpt_bigcode": ("GPT-BigCode (StarCoder)", GPT2_SIZES),
    "gpt_neox": ("GPT-NeoX", SIZES),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BLOOM", {**SIZES, "n_head": 4, "n_layer": 2}),
    "falcon": ("Falcon", SIZES),
    "phi": ("Phi", SIZES),
    "starcoder2": ("StarCoder2", {**SIZES, "num_key_value_heads": 2}),
    "t5": (
        "T5",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "whisper": (
        "Whisper",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": MEL_BINS,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 64,
            "decoder_start_token_id": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}
"""model_type of transformers -> (its name for people, sizes)."""

ENCODER_SIZES = {**SIZES, "bos_token_id": 2, "eos_token_id": 1}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BERT", ENCODER_SIZES),
    "roberta": ("RoBERTa", ENCODER_SIZES),
    "distilbert": (
        "DistilBERT",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "camembert": ("CamemBERT", ENCODER_SIZES),
    "deberta-v2": (
        "DeBERTa-v2",
        {
            **ENCODER_SIZES,
            "pos_att_type": ["p2c", "c2p"],
            "relative_attention": True,
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": 32,
        },
    ),
    "modernbert": (
        "ModernBERT",
        {
            **ENCODER_SIZES,
            "cls_token_id": 2,
            "sep_token_id": 1,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "classifier_pooling": "mean",
        },
    ),
    "electra": ("ELECTRA", {**ENCODER_SIZES, "embedding_size": 16}),
    "albert": ("ALBERT", {**ENCODER_SIZES, "embedding_size": 16}),
    "mpnet": ("MPNet", ENCODER_SIZES),
    "xlm-roberta": ("XLM-RoBERTa", ENCODER_SIZES),
}
"""Encoders: model_type of transformers -> (its name for people, sizes)."""

EXPERT_SIZES = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**EXPERT_SIZES, "num_local_experts": 4, "intermediate_size": 24}),
    "qwen2_moe": (
        "Qwen2-MoE",
        {
            **EXPERT_SIZES,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [],
        },
    ),
    "qwen3_moe": ("Qwen3-MoE", {**EXPERT_SIZES, "num_experts": 4}),
    "olmoe": ("OLMoE", {**EXPERT_SIZES, "num_experts": 4, "intermediate_size": 24}),
    "gpt_oss": (
        "GPT-OSS",
        {
            **EXPERT_SIZES,
            "num_local_experts": 4,
            "intermediate_size": 24,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
}
"""Mixtures of experts with fused weights: model_type of transformers -> (its name for people, sizes)."""
ROUTERS = (".gate.weight", ".router.weight")
ROUTER_SCALE = 30.0
"""Random routers decide almost by chance, so that rounding would send tokens to other experts."""


def architecture_config(architecture: str) -> PretrainedConfig:
    sizes = {**ARCHITECTURES, **ENCODERS, **MIXTURES}[architecture][1]
    config = AutoConfig.for_model(architecture, **sizes)
    disable_dropout(config)
    return config


def auto_class(config: PretrainedConfig) -> Any:
    if config.model_type == "whisper":
        return AutoModelForSpeechSeq2Seq
    if config.model_type in ENCODERS:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random-weight model, the same at every call."""
    torch.manual_seed(0)
    config = architecture_config(architecture)
    model: nn.Module = auto_class(config).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # a zero bias would hide mistakes with biases
                parameter.normal_(std=0.1)
            if architecture in MIXTURES and name.endswith(ROUTERS):
                parameter.mul_(ROUTER_SCALE)
    return model.to(dtype)


def features_of(tokens: Tensor) -> Tensor:
    """Stand-in for log-mel features [B, mel bins, frames]: random numbers that depend on a row's tokens [B,
    L] alone."""
    rows = [
        torch.randn(
            MEL_BINS,
            FRAMES,
            generator=torch.Generator().manual_seed(int((row * torch.arange(1, len(row) + 1)).sum())),
        )
        for row in tokens
    ]
    return torch.stack(rows)


def model_inputs(architecture: str, tokens: Tensor) -> Mapping[str, Tensor]:
    """What a forward pass on `tokens` [B, L] is called with."""
    if architecture == "whisper":
        return {"input_features": features_of(tokens), "decoder_input_ids": tokens}
    return (
        {"input_ids": tokens, "decoder_input_ids": tokens} if architecture == "t5" else {"input_ids": tokens}
    )
