"""Local training of one client's whole base, beside the head in its adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isfinite

import torch
from torch import Tensor, nn

from flora_train.federated.bank_values import read_values
from flora_train.federated.local_training import Client, LocalResult, LocalSteps, train_clients
from flora_train.training.optimizer import learning_rate
from flora_train.training.trainer import Trainer


class BaseTraining:
    """Trains the base with the rates, decay and clip norm of one client's adapter, from a fresh optimizer.

    The base is clipped by its own norm, and the head by its own, as adapters are.
    """

    def __init__(
        self, trainer: Trainer, client: Client, after_step: Callable[[], None] = lambda: None
    ) -> None:
        self.trainer, self.client, self.after_step = trainer, client, after_step
        self.adapter = trainer.bank.id_of(client.adapter)
        self.spec = trainer.bank.specs[self.adapter]
        self.parameters: dict[str, nn.Parameter] = dict(trainer.model.named_parameters())
        self.optimizer = self._make_optimizer()
        self.trained: set[str] = set()
        """Parameters that got a gradient: no other travels."""

    def run(self, local: LocalSteps, *, round_number: int, seed: int) -> LocalResult:
        """Train for one round, in place. Afterwards the base is frozen again."""
        self.trainer.model.requires_grad_(True)
        try:
            results = train_clients(
                self.trainer,
                [self.client],
                local,
                round_number=round_number,
                seed=seed,
                after_step=self._step,
            )
        finally:
            self.trainer.model.requires_grad_(False)
        return results[self.client.name]

    def values(self) -> dict[str, Tensor]:
        """Copies of the trained parameters of the base, and of the head."""
        own = {name: self.parameters[name].detach().clone() for name in sorted(self.trained)}
        return own | dict(read_values(self.trainer.bank, self.client.adapter).tensors())

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config, decay = self.trainer.config.training, self.spec.weight_decay
        parameters = list(self.parameters.values())
        if config.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.spec.lr, weight_decay=decay)
        return torch.optim.AdamW(
            parameters, lr=self.spec.lr, betas=config.betas, eps=config.eps, weight_decay=decay
        )

    def _step(self) -> None:
        """Update the base after its head; nothing if the gradient of either is not finite."""
        limit = self.spec.max_grad_norm or inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        skipped = self.trainer.metrics.last_steps[self.adapter].skipped
        self.trained |= {name for name, own in self.parameters.items() if own.grad is not None}
        if not skipped and isfinite(float(norm)):
            taken = self.trainer.optimizer.steps[self.adapter]
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.spec, taken - 1)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()


@torch.no_grad()
def load_base(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters of the base, by name."""
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])
