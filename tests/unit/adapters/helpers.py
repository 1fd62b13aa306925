"""Inputs and outputs that the adapter and export tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, T5Config

from flora_train.adapters.bank import AdapterBank
from tests.architectures import VOCABULARY, tiny_model


def tokens(rows: int, length: int = 11) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(bank: AdapterBank, x: Tensor, adapters: Tensor | Sequence[int] | Sequence[str]) -> Tensor:
    """[rows, length, vocabulary], row i through adapters[i]."""
    with bank.routed(adapters):
        return bank.model(input_ids=x).logits


@torch.no_grad()
def plain_logits(architecture: str, x: Tensor) -> Tensor:
    """What the model says that no bank was attached to."""
    return tiny_model(architecture).eval()(input_ids=x).logits


def tiny_t5(**options: Any) -> Any:
    """A random-weight encoder-decoder, the same at every call."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes, **options)
    return AutoModelForSeq2SeqLM.from_config(config)
