"""Federated clients in plain PEFT, one after the other on one model: load, train with a fresh AdamW, take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.training_schema import TrainingConfig

State = Mapping[str, Tensor]
"""An adapter with its head, as PEFT names its parameters."""
ClientBatch = tuple[dict[str, Tensor], Tensor]
"""The model's arguments, and the labels [B]."""
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def load_classifier(folder: str, labels: int) -> Any:
    """The base with a new classifier, without dropout, in float32."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=torch.float32, attn_implementation="eager", **NO_DROPOUT
    )


class PeftClients:
    """Clients that take turns on one PEFT model.

    Args:
        base: A classifier; its body gets the adapter.
        spec: The LoRA adapter.
        training: Options of AdamW.
    """

    def __init__(self, base: Any, spec: AdapterSpec, training: TrainingConfig) -> None:
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=spec.rank,
            lora_alpha=spec.alpha,
            target_modules=list(spec.target_modules),
        )
        self.model: Any = get_peft_model(base, config).train()
        self.spec, self.training = spec, training
        heads, factors = [], []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                group = factors if "lora_" in name else heads
                group.append(parameter)
        self.parameters = [*factors, *heads]
        self.groups = [
            {"params": factors, "lr": spec.lr},
            {"params": heads, "lr": spec.head_lr or spec.lr},
        ]

    def state(self) -> dict[str, Tensor]:
        """A copy of the present adapter."""
        own = get_peft_model_state_dict(self.model)
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    def round(self, state: State, clients: Sequence[tuple[int, Sequence[ClientBatch]]]) -> dict[str, Tensor]:
        """One round of FedAvg.

        Args:
            state: The global adapter.
            clients: (number of examples, batches) of each client.

        Returns:
            The mean of the clients' adapters, weighted by their examples.
        """
        states = [self.client(state, batches) for _, batches in clients]
        examples = [count for count, _ in clients]
        means = {}
        for name in state:
            total = torch.zeros_like(states[0][name], dtype=torch.float64)
            for own, count in zip(states, examples, strict=True):
                total.add_(own[name].double(), alpha=count / sum(examples))
            means[name] = total.to(states[0][name])
        return means

    def client(self, state: State, batches: Sequence[ClientBatch]) -> dict[str, Tensor]:
        """Train one client from the global adapter; its adapter afterwards."""
        set_peft_model_state_dict(self.model, dict(state))
        optimizer = torch.optim.AdamW(
            self.groups,
            betas=self.training.betas,
            eps=self.training.eps,
            weight_decay=self.spec.weight_decay,
        )
        for inputs, labels in batches:
            loss = cross_entropy(self.model(**inputs).logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.spec.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        return self.state()
