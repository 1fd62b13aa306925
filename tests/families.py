"""Causal model families of transformers as tiny random models, with the promises made before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flora_train.models.loading import disable_dropout
from tests.architectures import VOCABULARY

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_size",
            "embedding_dim",
            "word_embed_proj_dim",
        ),
        32,
    ),
    **dict.fromkeys(("lru_width", "conv_dim"), 32),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "d_inner",
            "dff",
        ),
        48,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2
    ),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("decoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "num_experts_per_tok",
            "n_mamba_heads",
            "linear_num_key_heads",
            "mamba_expand",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "mamba_d_state",
            "state_size",
            "ssm_state_size",
        ),
        8,
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions", "n_ctx"), 64
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "qk_rope_head_dim", "qk_nope_head_dim"), 4
    ),
    **dict.fromkeys(
        ("time_step_rank", "mamba_dt_rank", "mamba_chunk_size", "chunk_size", "adapter_rank", "rotary_dim"), 4
    ),
    **dict.fromkeys(
        (
            "n_group",
            "topk_group",
            "n_shared_experts",
            "n_groups",
            "mamba_ngroups",
            "mamba_n_groups",
            "eos_token_id",
        ),
        1,
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("sliding_window", "attention_window_size", "mamba_d_head", "mamba_head_dim"), 16),
}
"""Whatever a configuration calls its sizes -> tiny ones."""

TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"]}
SHARED = {
    "num_hidden_layers": 3,
    "attention_head_dim": 16,
    "attention_hidden_size": 64,
    "n_mamba_heads": 4,
    "head_dim": None,
}


@dataclass(frozen=True)
class Family:
    """options: beside SIZES (None: not given); left_out: what the line on layers without adapters says of;
    refused: why it is not trained; batching: how its texts are generated."""

    options: dict[str, Any]
    left_out: str = ""
    refused: str = ""
    batching: str = "batched"


CROSS, NOT_CAUSAL = "encoder_attn", "sees the tokens that it is to predict"
FAMILIES: dict[str, Family] = {
    # attention alone
    **dict.fromkeys(
        ("bloom", "falcon", "mpt", "codegen", "gptj", "gpt_bigcode", "biogpt", "opt", "xglm", "ctrl"),
        Family({}),
    ),
    **dict.fromkeys(
        (
            "gemma2",
            "gemma3_text",
            "cohere",
            "cohere2",
            "modernbert-decoder",
            "persimmon",
            "stablelm",
            "nanochat",
        ),
        Family({}),
    ),
    **dict.fromkeys(("qwen2", "olmo", "olmo2", "olmo3", "granite", "smollm3", "phi3"), Family({})),
    "gpt_neo": Family(
        {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]}
    ),
    # experts
    **dict.fromkeys(
        ("gpt_oss", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "jetmoe", "granitemoe"), Family({})
    ),
    "dbrx": Family(
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        }
    ),
    "deepseek_v3": Family({"num_key_value_heads": 4, "head_dim": 4, "qk_head_dim": 8}),
    "phimoe": Family({}, left_out="mlp.router"),
    "llama4_text": Family({}, left_out="feed_forward.router"),
    "longcat_flash": Family(
        {"num_key_value_heads": 4, "head_dim": 4, "qk_head_dim": 8}, left_out="router.classifier"
    ),
    # states beside keys and values
    "mamba": Family({}, left_out="mixer.dt_proj", batching="single_row"),
    "falcon_mamba": Family({}, left_out="mixer.dt_proj", batching="single_row"),
    "mamba2": Family({"num_heads": 4, "head_dim": 16}, batching="single_row"),
    "jamba": Family(
        {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        left_out="mamba.dt_proj",
        batching="single_row",
    ),
    "bamba": Family({"attn_layer_indices": [1], "attn_rotary_emb": 8}, batching="single_row"),
    "zamba": Family(
        {**SHARED, "layer_types": ["linear_attention", "hybrid", "hybrid"]}, batching="single_row"
    ),
    "zamba2": Family(
        {
            **SHARED,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_mem_blocks": 1,
            "mamba_headdim": 16,
        },
        left_out="gate_up_proj_adapter_list",
        batching="single_row",
    ),
    "recurrent_gemma": Family({"num_hidden_layers": 3}, batching="uncached"),
    "rwkv": Family({}, batching="single_row"),
    "falcon_h1": Family({"mamba_d_ssm": 64}, batching="single_row"),
    "lfm2": Family({"layer_types": ["conv", "full_attention"]}, batching="single_row"),
    "lfm2_moe": Family(
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, batching="single_row"
    ),
    "granitemoehybrid": Family(TWO_KINDS, batching="single_row"),
    "nemotron_h": Family({}, batching="single_row"),
    "qwen3_next": Family(TWO_KINDS, batching="single_row"),
    "qwen3_5_text": Family(TWO_KINDS, batching="single_row"),
    "minimax": Family(TWO_KINDS, batching="single_row"),
    "olmo_hybrid": Family({}, batching="single_row"),
    "xlstm": Family({"head_dim": None, "num_blocks": 2, "chunk_size": 4}, batching="uncached"),
    # decoders of an encoder and a decoder, and models that also see
    **dict.fromkeys(
        ("bart", "pegasus", "mbart", "marian"), Family({}, left_out=CROSS, batching="single_row")
    ),
    "git": Family({}, left_out="git.image_encoder", batching="single_row"),
    "fuyu": Family({}, left_out="vision_embed_tokens"),
    "gemma3": Family({}, left_out="model.vision_tower"),
    "got_ocr2": Family({}, left_out="model.vision_tower"),
    "deepseek_v32": Family(
        {"num_key_value_heads": 4, "head_dim": 4}, left_out="self_attn.indexer", batching="single_row"
    ),
    # refused
    "xlnet": Family({}, refused="does not have its rows first: transformer.layer.0.ff.layer_1 gets"),
    "bert-generation": Family({}, refused=NOT_CAUSAL),
    "cpmant": Family({}, refused=f"({NOT_CAUSAL}|changes a row's loss)"),
    "reformer": Family(
        {
            "is_decoder": True,
            "attention_head_size": 8,
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [16, 16],
            "attn_layers": ["local", "local"],
            "feed_forward_size": 48,
            "local_attn_chunk_length": 4,
        },
        refused="has no linear layer to adapt that an adapter can be attached to",
    ),
}

FUSED_EXPERTS: dict[str, dict[str, Any]] = {
    "granitemoe": {},
    "granitemoehybrid": {},
    "deepseek_v3": {"first_k_dense_replace": 0},
    "phimoe": {},
    "jamba": {},
    "lfm2_moe": {},
    "nemotron_h": {},
    "qwen3_next": {},
    "minimax": {},
}
"""Families whose fused experts take adapters -> options beside those of the family. Mixtral and others that
are tested more thoroughly are in tests/architectures.py."""
EXPERT_LISTS = ("nllb_moe", "switch_transformers", "vitpose_backbone")
"""The families of transformers whose experts are modules with linear layers, called one after the other."""
OTHER_EXPERTS = {"llama4_text": "experts.gate_up_proj", "dbrx": "experts.mlp.w1"}
"""Families whose experts have another layout -> one of their parameters."""

QUICK = (
    "mamba",
    "lfm2",
    "phimoe",
    "xlnet",
    "bart",
    "ctrl",
    "gpt_oss",
    "rwkv",
    "cpmant",
    "git",
    "gemma2",
)
"""What `make test` looks at; the others are in make test-full."""


def family_config(name: str, **more: Any) -> Any:
    family = FAMILIES[name]
    default = AutoConfig.for_model(name)
    sizes = _sizes(default)
    for key, part in vars(default).items():
        if hasattr(part, "model_type"):
            sizes[key] = _sizes(part)
    given = dict(sizes)
    for key, value in {**family.options, **more}.items():
        given[key] = (
            {**sizes[key], **value} if isinstance(sizes.get(key), dict) and isinstance(value, dict) else value
        )
    config = AutoConfig.for_model(name, **{key: value for key, value in given.items() if value is not None})
    disable_dropout(config)
    return config


def _sizes(config: Any) -> dict[str, Any]:
    names = {*vars(config), *getattr(config, "attribute_map", {})}
    return {
        key: value for key, value in SIZES.items() if key in names and getattr(config, key, None) is not None
    }


def family_model(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """A random-weight model, the same at every call; weights so large that its next token depends on what it
    read."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(family_config(name, **more), dtype=dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(
                word in parameter_name for word in ("embed", "wpe", "A_log", "conv")
            ):
                parameter.mul_(3.0)
    return model
