"""How do adapters move in a training loop that wants one of torch's optimizers, such as that of transformers.Trainer?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.config.schema import TrainingConfig
from flora_train.training.optimizer import BankOptimizer


class TorchBankOptimizer(torch.optim.Optimizer):
    """A BankOptimizer with the methods of torch's. A step moves the adapters that have a gradient, each at its own learning rate and schedule
    (`lr` of the parameter group counts for nothing, nor does a scheduler), and clears those gradients.

    Raises ValueError for a bank that pages: which adapters the next batch needs has to be known ahead there.
    """

    def __init__(self, bank: AdapterBank, config: TrainingConfig) -> None:
        if bank.pager is not None:
            raise ValueError("a bank that pages is trained by flora_train's own loop, which knows the coming batches")
        self.rows = BankOptimizer(bank, config)
        super().__init__([torch.zeros((), requires_grad=True)], {"lr": 0.0})  # torch wants a parameter; it is none of the bank's

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the adapters of all batches since the last step."""
        loss = None if closure is None else closure()
        bank = self.rows.bank
        self.rows.step([adapter for adapter in range(len(bank.specs)) if bank.gradient_row(adapter).any()])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all adapters."""
        for pool in self.rows.bank.pools:
            pool.gradients.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Moments, values and step counts of all adapters."""
        return {"steps": list(self.rows.steps), "tensors": self.rows.bank.tensors(), "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, of a bank with the same adapters."""
        self.rows.steps = list(state_dict["steps"])
        for name, tensor in self.rows.bank.tensors().items():
            tensor.copy_(state_dict["tensors"][name])
