"""A PEFT run of one adapter on a separate base model: a plain loop over batches, of text or speech."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import find_targets
from flora_train.config.schema import RunConfig
from flora_train.data.batch import IGNORE, Collate, MixedBatch
from flora_train.data.token_split import TokenSplit
from flora_train.export.peft_format import peft_tensors
from flora_train.models.loading import load_base_model
from flora_train.training.step_plan import StepPlan

Batch = tuple[dict[str, Tensor], Tensor]
"""The model's arguments, and the labels [B, L] of its logits."""


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
            feedforward = [name for name in modules if name.endswith(("fc2", "down_proj"))]
            options = IA3Config(target_modules=modules, feedforward_modules=feedforward)
        self.model = get_peft_model(base, options).train()
        self.max_grad_norm = spec.max_grad_norm or float("inf")
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=spec.lr, betas=config.training.betas, weight_decay=spec.weight_decay
        )

    def begin_as(self, bank: AdapterBank, name: str) -> None:
        """Set the parameters to the current values of an adapter of flora_train."""
        set_peft_model_state_dict(self.model, peft_tensors(bank, name))

    def step(self, batches: Sequence[Batch], lr: float | None = None) -> float:
        """One update from all batches, weighted by their trained tokens; returns the mean loss per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if lr is None else lr
        tokens, total = label_tokens(batches), 0.0
        for batch in batches:
            loss = self.loss(batch)
            (loss / tokens).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / tokens

    def heldout(self, batches: Sequence[Batch]) -> float:
        """Mean loss of a token."""
        self.model.eval()
        with torch.no_grad():
            total = sum(float(self.loss(batch)) for batch in batches)
        self.model.train()
        return total / label_tokens(batches)

    def loss(self, batch: Batch) -> Tensor:
        """Summed over trained tokens."""
        inputs, labels = batch
        logits = self.model(**inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum"
        )


def label_tokens(batches: Sequence[Batch]) -> int:
    return sum(int((labels != IGNORE).sum()) for _, labels in batches)


def batches_of(
    plan: StepPlan, adapter: int, split_of: Callable[[str], TokenSplit], collate: Collate, pad_token: int
) -> list[Batch]:
    """One adapter's part of a joint step; clips are in batches of the same windows."""
    groups = [[row for row in group if row.adapter == adapter] for group in plan.microbatches]
    return [as_batch(collate(rows, split_of, pad_token)) for rows in groups if rows]


def as_batch(batch: MixedBatch) -> Batch:
    if batch.clips is None:
        return dict(batch.inputs), torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
    features = batch.inputs["input_features"][batch.clips]
    return {"input_features": features, "decoder_input_ids": batch.inputs["decoder_input_ids"]}, batch.labels
