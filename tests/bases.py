"""Tiny models in the layout of younger code models: published configuration but for sizes, and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.base_tokenizers import PUBLISHED, VOCABULARY

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Layout:
    """A model as it is published."""

    path: str
    """Its name on the hub."""
    tokenizer: str
    config: dict[str, Any]
    """config.json without sizes and numbers of special tokens."""
    spare: int = 0
    """Rows of the embedding that no token uses."""
    special: dict[str, str] = field(default_factory=dict)
    """Keys of config.json that hold the number of a special token -> the token."""
    start: tuple[str, ...] = ()
    """Tokens before a text."""
    end: str = "<|endoftext|>"
    """The token after a text."""
    pad: str | None = None
    """The padding token, if the tokenizer has one."""
    query_key: tuple[str, ...] = ("k_proj", "q_proj")
    ia3: tuple[str, ...] = ("k_proj", "v_proj")
    """Layers whose output IA3 scales."""
    ia3_inputs: str = "down_proj"
    """The layer whose input IA3 scales."""


END_OF_TEXT = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"}
DEEPSEEK = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")

LAYOUTS: dict[str, Layout] = {
    "starcoder2": Layout(
        "bigcode/starcoder2-3b",
        "starcoder2",
        {
            "architectures": ["Starcoder2ForCausalLM"],
            "attention_dropout": 0.1,
            "embedding_dropout": 0.1,
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.018042,
            "max_position_embeddings": 16384,
            "model_type": "starcoder2",
            "norm_epsilon": 1e-05,
            "num_key_value_heads": 2,
            "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813,
            "sliding_window": 4096,
            "torch_dtype": "float32",
            "use_bias": True,
            "use_cache": True,
        },
        special=END_OF_TEXT,
        ia3_inputs="c_proj",
    ),
    "qwen2.5-coder": Layout(
        "Qwen/Qwen2.5-Coder-1.5B",
        "qwen2.5-coder",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
        },
        spare=27,
        special=END_OF_TEXT,
        pad="<|endoftext|>",
        ia3=("q_proj", "v_proj"),
    ),
    "deepseek-coder": Layout(
        "deepseek-ai/deepseek-coder-1.3b-base",
        "deepseek-coder",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "rope_theta": 100000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
        spare=24,
        special=dict(zip(("bos_token_id", "eos_token_id"), DEEPSEEK, strict=True)),
        start=DEEPSEEK[:1],
        end=DEEPSEEK[1],
        pad=DEEPSEEK[1],
    ),
    "codellama": Layout(
        "codellama/CodeLlama-7b-hf",
        "codellama",
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_key_value_heads": 4,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
        special={"bos_token_id": "<s>", "eos_token_id": "</s>"},
        start=("<s>",),
        end="</s>",
    ),
    "olmo2": Layout(
        "allenai/OLMo-2-0425-1B",
        "olmo2",
        {
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 4096,
            "model_type": "olmo2",
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "use_cache": True,
        },
        special={"eos_token_id": "<|endoftext|>", "pad_token_id": "<|pad|>"},
        pad="<|pad|>",
    ),
}
"""Name -> model. Every one begins with `recipe=multipl_e model.path=NAME`."""


def save_base(name: str, folder: Path) -> Path:
    """Write a layout's tiny model with random weights, and its tokenizer."""
    layout = LAYOUTS[name]
    tokenizer = PUBLISHED[layout.tokenizer]()
    tokenizer.save(folder)
    numbers = {key: tokenizer.core.token_to_id(token) for key, token in layout.special.items()}
    vocabulary = tokenizer.core.get_vocab_size() + layout.spare
    assert vocabulary >= VOCABULARY
    content = {**layout.config, **SIZES, **numbers, "vocab_size": vocabulary}
    config = folder / "config.json"
    config.write_text(json.dumps(content, indent=2))
    torch.manual_seed(0)
    dtype = getattr(torch, layout.config["torch_dtype"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # a zero bias would hide mistakes with biases
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    config.write_text(json.dumps(content, indent=2))  # as it is published, not as it is saved today
    return folder
