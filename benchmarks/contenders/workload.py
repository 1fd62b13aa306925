"""The work of every contender: the same model, the same batch, one optimizer step for each request of the
driver.

A contender is a program: it builds its model and N adapters, prints `ready`, and answers every line of
standard input with the seconds of one step (forward, loss, backward, AdamW on every adapter). It must not
depend on flora_train, because peers run in environments of their own.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = {"lora": 8, "flora": 4, "hira": 4}
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Work:
    """adapters: number of adapters that share the rows equally; rows x length tokens without padding."""

    model: str
    method: str
    adapters: int
    rows: int
    length: int
    threads: int

    @property
    def names(self) -> list[str]:
        return [f"adapter{i}" for i in range(self.adapters)]

    @property
    def rows_each(self) -> int:
        return self.rows // self.adapters


def parse() -> Work:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="`small` (random weights) or the folder of a checkpoint")
    parser.add_argument("method")
    for name in ("adapters", "rows", "length", "threads"):
        parser.add_argument(name, type=int)
    work = Work(**vars(parser.parse_args()))
    torch.set_num_threads(work.threads)
    return work


def load_model(work: Work) -> Any:
    """The base in float32, frozen."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    if work.model == "small":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    else:
        model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    return model.requires_grad_(False)


def make_batch(work: Work, vocabulary: int) -> Tensor:
    """Token ids [rows, length]."""
    return torch.randint(0, vocabulary, (work.rows, work.length), generator=torch.Generator().manual_seed(1))


def serve(step: Callable[[], Any]) -> None:
    """Warm up, then one step per line of standard input."""
    for _ in range(2):
        step()
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
