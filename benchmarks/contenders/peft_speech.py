"""A PEFT run of one speech adapter, on a base of its own: a plain loop over batches of features, decoder tokens and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model

from flora_train.adapters.base_model import load_base_model
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import find_targets
from flora_train.config.schema import RunConfig
from flora_train.data.batch import IGNORE, Collate
from flora_train.data.task import Task
from flora_train.training.plan import StepPlan

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Features [B, mel bins, frames], decoder tokens and labels [B, L]."""


class PeftRun:
    """spec: what to train; flora becomes HiRA, which is its residual form."""

    def __init__(self, config: RunConfig, spec: AdapterSpec) -> None:
        base: Any = load_base_model(config.model, torch.device("cpu"))
        modules = sorted(find_targets(base, spec))
        if spec.method == "lora":
            options: Any = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=modules)
        elif spec.method == "flora":
            options = HiraConfig(r=spec.rank, target_modules=modules)
        else:
            feedforward = [name for name in modules if name.endswith("fc2")]
            options = IA3Config(target_modules=modules, feedforward_modules=feedforward)
        self.model = get_peft_model(base, options).train()
        self.max_grad_norm = spec.max_grad_norm or float("inf")
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=spec.lr, betas=config.training.betas, weight_decay=spec.weight_decay
        )

    def step(self, batches: Sequence[Batch], lr: float | None = None) -> float:
        """One update from all batches, which weigh by their learnt tokens; returns the mean loss of one."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        tokens, total = sum(int((labels != IGNORE).sum()) for *_, labels in batches), 0.0
        for features, read, labels in batches:
            logits = self.model(input_features=features, decoder_input_ids=read).logits
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum")
            (loss / tokens).backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / tokens


def batches_of(plan: StepPlan, adapter: int, tasks: Mapping[str, Task], collate: Collate, pad_token: int) -> list[Batch]:
    """One adapter's part of a joint step, in batches of the same windows."""
    found = []
    for group in plan.microbatches:
        if rows := [row for row in group if row.adapter == adapter]:
            batch = collate(rows, lambda task: tasks[task].train, pad_token)
            assert batch.clips is not None
            found.append((batch.inputs["input_features"][batch.clips], batch.inputs["decoder_input_ids"], batch.labels))
    return found
