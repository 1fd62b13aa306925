"""Attention of one new token per row equals PyTorch's, and is removed from the model afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from flora_train.evaluation.generation.attention import NAME, decoding_attention, one_query_attention
from tests.architectures import tiny_model


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_one_query_attention_equals_torchs_attention(
    key_heads: int, masked: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    query = torch.randn(4, 6, 1, 8, dtype=dtype)
    key, value = (
        torch.randn(4, key_heads, 20, 8, dtype=dtype)[:, :, :13] for _ in range(2)
    )  # a view of a larger buffer
    mask = (
        torch.arange(13)[None, None, None] >= torch.tensor([0, 3, 12, 5])[:, None, None, None]
        if masked
        else None
    )
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=6 // key_heads)
    found, _ = one_query_attention(module, query, key, value, mask, scaling=0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=tolerance, atol=tolerance)


def test_decoding_attention_restores_the_models_attention_even_after_an_error() -> None:
    model = tiny_model("llama")

    def fails() -> None:
        with decoding_attention(model):
            assert model.config._attn_implementation == NAME
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with decoding_attention(model):
        assert model.config._attn_implementation == "eager"
