"""Preference tasks of random tokens, trained by our trainer, and the same rows as text for TRL's trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.load import validate
from flora_train.data.documents import EncodedDocument, EncodedExample
from flora_train.data.mixture import Draw
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import preference_split
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.task import Task
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.step_plan import plan_step
from flora_train.training.trainer import Trainer
from tests.architectures import VOCABULARY, tiny_model

PAD, END = 0, 1
LIMIT = 24
"""Tokens of the longest row."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class RandomRows:
    """Rows of one task, as token ids; completions are without their end token."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    """For each row, chosen and rejected, or the one completion."""
    labels: list[bool]
    """Empty for pairs."""

    def task(self, name: str, preference: Preference) -> Task:
        builder = SplitBuilder()
        for i, (prompt, completions) in enumerate(zip(self.prompts, self.completions, strict=True)):
            documents = []
            for completion in completions:
                tokens = np.array([*prompt, *completion, END], dtype=np.int32)
                documents.append(EncodedDocument(tokens, [(len(prompt), len(tokens))], len(completion)))
            label = self.labels[i] if self.labels else None
            builder.add(EncodedExample(tuple(documents), "whole", label=label))
        split = preference_split(builder.split(), LIMIT)
        return Task(name, 1.0, split, split, "", preference=preference)

    def for_trl(self, order: Sequence[int]) -> list[dict[str, Any]]:
        """The rows in the order in which they are trained, as text."""
        rows = []
        for i in order:
            texts = [" " + _text(completion) for completion in self.completions[i]]
            row: dict[str, Any] = {"prompt": _text(self.prompts[i])}
            if self.labels:
                row |= {"completion": texts[0], "label": self.labels[i]}
            else:
                row |= {"chosen": texts[0], "rejected": texts[1]}
            rows.append(row)
        return rows


def random_rows(seed: int, n: int, *, labelled: bool, longest_prompt: int = 6) -> RandomRows:
    generator = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        return generator.integers(2, VOCABULARY, generator.integers(1, most + 1)).tolist()

    prompts = [tokens(longest_prompt) for _ in range(n)]
    completions = [[tokens(LIMIT - longest_prompt - 1) for _ in range(2 - labelled)] for _ in range(n)]
    labels = []
    if labelled:
        labels = [i % 3 > 0 for i in range(n)]
    return RandomRows(prompts, completions, labels)


def _text(tokens: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def save_base(folder: Path) -> Path:
    """The tiny Llama with a tokenizer whose words are its tokens."""
    tiny_model("llama").save_pretrained(folder)
    words = {"<pad>": PAD, "</s>": END, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


@dataclass
class FixedDraws:
    """A mixture that draws the next `size` examples of every task in each step."""

    tasks: Mapping[str, Sequence[str]]
    """Task -> its adapters."""
    size: int
    seed: int = 0

    def step(self, number: int) -> list[Draw]:
        examples = tuple(range(number * self.size, (number + 1) * self.size))
        return [Draw(task, examples, tuple(adapters)) for task, adapters in self.tasks.items()]


@dataclass
class OurRun:
    """Adapters trained together, and what each step said."""

    trainer: Trainer
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Adapter -> loss of every step."""
    initial: dict[str, Path] = field(default_factory=dict)
    """Adapter -> PEFT folder of its initial weights."""
    final: dict[str, Tensors] = field(default_factory=dict)
    """Adapter -> tensors of its PEFT file after training."""


def train_ours(
    specs: Sequence[AdapterSpec],
    tasks: Mapping[str, Task],
    folder: Path,
    *,
    base: Path,
    steps: int,
    batch_size: int,
    **training: Any,
) -> OurRun:
    """Train all adapters in the same batches."""
    config = validate(
        {
            "name": "test",
            "model": {"path": str(base)},
            "tasks": {name: {"train": "unused.jsonl"} for name in tasks},
            "adapters": {"unused": {"method": "lora", "lr": 1e-3}},
            "mixture": {"examples_per_draw": batch_size},
            "training": {
                "steps": steps,
                "tokens_per_step": 100_000,
                "tokens_per_microbatch": 100_000,
                "max_length": LIMIT,
                **training,
            },
        }
    )
    model = tiny_model("llama")
    model.train()
    bank = AdapterBank.attach(model, specs)
    trainer = Trainer(
        TrainingContext(
            config=config, folder=RunFolder(folder), tasks=tasks, model=model, bank=bank, pad_token=PAD
        )
    )
    run = OurRun(trainer, {spec.name: [] for spec in specs})
    named = BaseModel(str(base), None)
    for spec in specs:
        run.initial[spec.name] = export_peft(bank, spec.name, folder / "initial" / spec.name, base=named)
    draws: Any = FixedDraws(
        {name: [spec.name for spec in specs if spec.task == name] for name in tasks}, batch_size
    )
    for number in range(steps):
        plan = plan_step(draws, number, tasks, bank, config.training.tokens_per_microbatch)
        assert plan is not None
        trainer.step(number, plan)
        for name, record in trainer.metrics.flush().items():
            run.losses[name].append(record["loss"])
    for spec in specs:
        exported = export_peft(bank, spec.name, folder / "final" / spec.name, base=named)
        run.final[spec.name] = load_file(exported / "adapter_model.safetensors")
    return run
