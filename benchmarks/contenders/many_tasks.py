"""A trainer of many tasks on a small model, without files, to measure what scales with the number of
adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.workload import SMALL
from transformers import AutoModelForCausalLM, LlamaConfig

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import expand
from flora_train.config.load import validate
from flora_train.data.task import Task
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.trainer import Trainer

EXAMPLES = 40


def make_trainer(
    adapters: dict[str, Any],
    tasks: int,
    mixture: dict[str, Any],
    training: dict[str, Any],
    folder: Path,
    device: torch.device,
    paging: Paging | None = None,
    model: str = "small",
) -> Trainer:
    """Every adapter on this number of tasks of random tokens, half to all of max_length long. model: `small`
    (random weights), or a folder."""
    config = validate(
        {
            "name": "many",
            "model": {"path": model},
            "tasks": {f"t{i}": {"train": "unused.jsonl"} for i in range(tasks)},
            "adapters": adapters,
            "mixture": mixture,
            "training": training,
        }
    )
    torch.manual_seed(0)
    if model == "small":
        base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    bank = AdapterBank.attach(base.to(device).train(), expand(config), paging=paging)
    length = config.training.max_length
    splits = {name: random_split(i, length, base.config.vocab_size) for i, name in enumerate(config.tasks)}
    known = {name: Task(name, 1.0, split, split, "") for name, split in splits.items()}
    return Trainer(
        TrainingContext(
            config=config,
            folder=RunFolder(folder),
            tasks=known,
            model=base,
            bank=bank,
            pad_token=0,
        )
    )


def random_split(seed: int, longest: int, vocabulary: int) -> TokenSplit:
    """EXAMPLES of random tokens."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(longest // 2, longest + 1, EXAMPLES)
    return TokenSplit(
        tokens=generator.integers(2, vocabulary, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        **spans_after(np.zeros(EXAMPLES), lengths),
        label_bytes=lengths.astype(np.int64),
        pack_offsets=np.arange(EXAMPLES + 1),
        counts=SplitCounts(rows=EXAMPLES, examples=EXAMPLES, tokens=int(lengths.sum())),
    )
