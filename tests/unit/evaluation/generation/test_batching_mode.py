"""The batching mode of a real model, whose many layers round more than those of the tiny test models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flora_train.evaluation.generation.batching_mode import batching_mode

SMALL = Path(__file__).resolve().parents[4] / "assets" / "models" / "smollm2-135m"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_small_model_is_batched_in_every_dtype(dtype: torch.dtype) -> None:
    assert SMALL.is_dir(), "make setup builds it"
    assert batching_mode(AutoModelForCausalLM.from_pretrained(SMALL, dtype=dtype)) == "batched"
