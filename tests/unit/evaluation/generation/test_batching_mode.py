"""In which way are a real model's rows decoded? Its many layers round more than the tiny models of the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flora_train.evaluation.generation.batching_mode import batching_mode

SMALL = Path(__file__).resolve().parents[4] / "assets" / "models" / "smollm2-135m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_small_model_is_decoded_together_in_every_type(dtype: torch.dtype) -> None:
    assert SMALL.is_dir(), "make setup builds it"
    assert batching_mode(AutoModelForCausalLM.from_pretrained(SMALL, dtype=dtype)) == "batched"
