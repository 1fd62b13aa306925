"""How do the adapters of a step move? Lazy, per-adapter AdamW or SGD on the bank's rows.

Every adapter has its own learning rate, decay, clip norm and step count, and only the adapters that were in the step
are touched: stock optimizers move absent ones through momentum and weight decay. The work is a few calls on stacked
rows per pool, whatever the number of adapters and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.pool import Pool
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.training_schema import TrainingConfig
from flora_train.kernels.backend import runs_in_triton
from flora_train.runtime.distributed import several_processes

MOMENTS = ("first", "second")
"""AdamW's planes of the bank."""


@dataclass(frozen=True)
class AdapterStep:
    """What one adapter's update was. skipped: its gradient was not finite, or its loss was bad; nothing of it moved."""

    lr: float
    gradient_norm: float
    skipped: bool


class BankOptimizer:
    """State: two planes of the bank (AdamW's moments), and each adapter's own step count."""

    def __init__(self, bank: AdapterBank, config: TrainingConfig) -> None:
        self.bank = bank
        self.config = config
        self.steps = [0] * len(bank.specs)
        for name in MOMENTS if config.optimizer == "adamw" else ():
            bank.add_plane(name)

    @torch.no_grad()
    def step(self, adapters: Iterable[int], bad: Collection[int] = ()) -> dict[int, AdapterStep]:
        """Update the adapters of this step from the pool's gradients, then clear those gradients. bad: of these, who must not move."""
        results: dict[int, AdapterStep] = {}
        for pool, members, rows in self.bank.by_pool(adapters):
            results |= self._step_pool(pool, members, rows, bad)
        return results

    def _step_pool(self, pool: Pool, adapters: list[int], rows: Any, bad: Collection[int]) -> dict[int, AdapterStep]:
        norms = torch.linalg.vector_norm(pool.gradients[rows], dim=1)
        norm_of = dict(zip(adapters, norms.tolist(), strict=True))  # the step's one wait for the device, per pool
        results = {
            a: AdapterStep(learning_rate(self.bank.specs[a], self.steps[a]), norm, a in bad or not _is_finite(norm))
            for a, norm in norm_of.items()
        }
        finite = [a for a in adapters if not results[a].skipped]
        if finite:
            for adapter in finite:
                self.steps[adapter] += 1
            ((_, _, moving),) = self.bank.by_pool(finite)
            self._update(pool, moving, finite, [results[a] for a in finite])
        pool.gradients[rows] = 0.0
        return results

    def _update(self, pool: Pool, slots: Tensor | slice, adapters: list[int], steps: list[AdapterStep]) -> None:
        beta1, beta2 = self.config.betas if self.config.optimizer == "adamw" else (0.0, 0.0)
        numbers = torch.tensor(
            [
                [
                    min(1.0, (self.bank.specs[a].max_grad_norm or float("inf")) / (step.gradient_norm + 1e-6)),
                    1.0 - step.lr * self.bank.specs[a].weight_decay,
                    -step.lr / (1.0 - beta1 ** self.steps[a]),
                    (1.0 - beta2 ** self.steps[a]) ** 0.5,
                ]
                for a, step in zip(adapters, steps, strict=True)
            ],
            dtype=pool.values.dtype,
            device=pool.values.device,
        )
        clip, decay, rate, root = numbers.split(1, dim=1)
        if self.config.optimizer == "sgd":
            pool.values[slots] = (pool.values[slots] * decay).addcmul_(pool.gradients[slots] * clip, rate)
            return
        first, second = (pool.planes[name] for name in MOMENTS)
        if runs_in_triton(pool.values):
            from flora_train.kernels.adamw_triton import fused_adamw

            rows = torch.arange(len(adapters), device=self.bank.device) if isinstance(slots, slice) else slots
            fused_adamw(pool.values, pool.gradients, first, second, rows, numbers, self.config.betas, self.config.eps)
            return
        gradient = pool.gradients[slots] * clip
        m = first[slots].lerp_(gradient, 1.0 - beta1)
        v = second[slots].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        first[slots], second[slots] = m, v
        denominator = v.sqrt().div_(root).add_(self.config.eps)
        pool.values[slots] = (pool.values[slots] * decay).addcdiv_(m.mul(rate), denominator)


def _is_finite(number: float) -> bool:
    return number - number == 0.0


def learning_rate(spec: AdapterSpec, step: int) -> float:
    """The learning rate of the adapter's own step number `step` (from 0).

    Linear warm-up over `warmup_steps`, then constant, linear to zero or half a cosine to zero at `max_steps`.
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, spec.max_steps - spec.warmup_steps))
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + cos(pi * progress))}[spec.lr_schedule]
    return spec.lr * factor


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


def sum_gradients(bank: AdapterBank, adapters: Iterable[int]) -> int:
    """Add up the gradients of these adapters over all processes, in place, one exchange per pool. Every process names
    the same adapters: the step is planned alike everywhere, also where a process holds no row of one of them.

    Returns the bytes that this process put in: those of these adapters, however many the bank has.
    """
    sent = 0
    for pool, _, rows in bank.by_pool(adapters) if several_processes() else ():
        gradients = pool.gradients[rows]
        dist.all_reduce(gradients)
        pool.gradients[rows] = gradients
        sent += gradients.nbytes
    return sent
