"""Tiny base models of several architectures that vLLM serves on a CPU, and eight adapters of every method for
each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flora_train.adapters.spec import AdapterSpec
from flora_train.models.loading import disable_dropout
from tests.conftest import spec
from tests.serving.tiny import MAX_LENGTH, OWN_TYPE, WORDS, save_tokenizer

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 32}
"""Sizes with two queries for each key. Heads of 32 numbers are the smallest that vLLM's attention on a CPU
computes."""


@dataclass(frozen=True)
class Layout:
    """An architecture and its layers."""

    model_type: str
    sizes: dict[str, Any]
    layers: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    query_value: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers of attention that the smaller adapters change."""
    others: tuple[str, ...] = ("k_proj", "gate_proj")
    """Parts of merged layers, of which other parts are not changed."""
    ia3_inputs: str = "down_proj"
    """The layer whose input IA3 scales."""


LAYOUTS = {
    "llama": Layout("llama", GROUPED),
    "qwen2": Layout("qwen2", {**SIZES, "num_key_value_heads": 2}),
    "qwen3": Layout("qwen3", GROUPED),
    "gpt_bigcode": Layout(
        "gpt_bigcode",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": MAX_LENGTH},
        layers=("c_attn", "c_fc", "attn.c_proj", "mlp.c_proj"),
        query_value=("c_attn",),
        others=("c_fc",),
        ia3_inputs="mlp.c_proj",
    ),
    "gemma": Layout("gemma", GROUPED),
    "phi": Layout(
        "phi",
        SIZES,
        layers=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
        others=("k_proj", "fc1"),
        ia3_inputs="fc2",
    ),
}


def save_layout(name: str, folder: Path) -> Path:
    """Write a layout's model with random weights, and a character tokenizer."""
    layout = LAYOUTS[name]
    save_tokenizer(folder)
    tokens = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(layout.model_type, **tokens, **layout.sizes)
    disable_dropout(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # a zero bias would hide mistakes with biases
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:  # of initial size, an untrained model answers every text alike
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def eight_adapters(name: str) -> list[AdapterSpec]:
    """fLoRA in both variants and as a FLORA, LoRA and IA3, of different ranks and targets."""
    layout = LAYOUTS[name]
    everywhere = {"target_modules": list(layout.layers)}
    attention = list(layout.query_value)
    outputs_and_inputs = [*attention, *layout.others, layout.ia3_inputs]
    return [
        spec("flora", "a", "residual", rank=3, variant="residual", **everywhere),
        spec("flora", "b", "pure", rank=2, variant="pure", target_modules=attention),
        spec(
            "flora", "c", "some", rank=16, variant="residual", target_modules=[*attention, layout.ia3_inputs]
        ),
        spec("flora", "a", OWN_TYPE, rank=4, variant="pure", **everywhere),
        spec("lora", "a", "lora", rank=4, **everywhere),
        spec("lora", "b", "lora_some", rank=8, target_modules=list(layout.others)),
        spec("ia3", "a", "ia3", target_modules=outputs_and_inputs, feedforward_modules=[layout.ia3_inputs]),
        spec(
            "ia3",
            "b",
            "ia3_some",
            target_modules=list(layout.others),
            feedforward_modules=[layout.others[-1]],
        ),
    ]
