"""Tiny random-weight models and adapter specs shared by the tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PhiConfig

from flora_train.adapters.spec import AdapterSpec, make_spec
from flora_train.config.schema import AdapterConfig

VOCABULARY = 97

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.0,
        pad_token_id=1,
    ),
    "phi": PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
}


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random-weight causal LM, the same at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # a zero bias would hide mistakes with biases
                parameter.normal_(std=0.1)
    return model.to(dtype)


def spec(method: str, task: str = "task", family: str | None = None, steps: int = 100, **options: Any) -> AdapterSpec:
    """An adapter with defaults for tests."""
    return make_spec(
        task, family or method, AdapterConfig(method=method, **{"lr": 1e-2, "schedule": "constant", **options}), steps
    )


def mixed_specs(**options: Any) -> list[AdapterSpec]:
    """Six adapters: every method, fLoRA in both variants, two ranks of fLoRA and LoRA, and a target set of its own."""
    return [
        spec("flora", "a", "flora", rank=3, variant="residual", **options),
        spec("flora", "b", "flora_one", rank=1, variant="pure", **options),
        spec("flora", "c", "pure", rank=3, variant="pure", **options),
        spec("lora", "a", "lora", rank=4, **options),
        spec("lora", "b", "lora_some", rank=2, target_modules=["q_proj", "down_proj"], **options),
        spec("ia3", "a", "ia3", **options),
    ]


def perturb(bank: Any, scale: float = 0.2) -> None:
    """Move every adapter away from the identity, as training would."""
    generator = torch.Generator().manual_seed(1)
    for pool in bank.pools:
        pool.values.add_(torch.randn(pool.values.shape, generator=generator).to(pool.values), alpha=scale)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny matrices gain nothing from a second thread, and tests run two at a time."""
    torch.set_num_threads(1)
