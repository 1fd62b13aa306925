"""Lazy, per-adapter AdamW or SGD on the rows of the bank, with learning rate, weight decay and gradient
clipping.

Every adapter has its own learning rate, decay, clip norm and step count, and only the adapters of a step are
updated:
stock optimizers move absent ones through momentum and weight decay. An update takes a few calls on stacked
rows per pool, whatever the number of adapters and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import cos, inf, isfinite, pi
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
from flora_train.training.train_state import by_name

MOMENTS = ("first", "second")
"""AdamW's planes of the bank."""
AVERAGE = "average"
"""The plane of averaged weights, in pools that have adapters with ema_decay."""


@dataclass(frozen=True)
class AdapterStep:
    """The update of one adapter in one step."""

    lr: float
    gradient_norm: float
    skipped: bool
    """The gradient was not finite, or the loss was anomalous: nothing of the adapter changed."""


class BankOptimizer:
    """Updates the adapters of a step. Its state are planes of the bank (AdamW's moments, averaged weights),
    which the bank's tensors hold, and the step count of every adapter.
    """

    def __init__(self, bank: AdapterBank, config: TrainingConfig) -> None:
        self.bank = bank
        self.config = config
        self.steps = [0] * len(bank.specs)
        """Updates so far, by adapter id."""
        for name in MOMENTS if config.optimizer == "adamw" else ():
            bank.add_plane(name)
        averaged = [pool for pool in bank.pools if pool.has_averages]
        if averaged:
            bank.add_plane(AVERAGE, averaged)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": by_name(dict(enumerate(self.steps)), self.bank.specs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Adapters without an entry begin at step 0."""
        self.steps = [state["steps"].get(spec.name, 0) for spec in self.bank.specs]

    @torch.no_grad()
    def reset(self, adapters: Iterable[int]) -> None:
        """Forget moments, averages and step counts of these adapters; their values stay."""
        for adapter in adapters:
            self.steps[adapter] = 0
            for name, row in self.bank.state(adapter).items():
                if name != "values":
                    row.zero_()

    @torch.no_grad()
    def step(self, adapters: Iterable[int], anomalous: Collection[int] = ()) -> dict[int, AdapterStep]:
        """Update these adapters from the gradients in their pools, then clear those gradients. anomalous:
        adapters that must not change.
        """
        results: dict[int, AdapterStep] = {}
        for pool, members, rows in self.bank.by_pool(adapters):
            results |= self._step_pool(pool, members, rows, anomalous)
        return results

    def _step_pool(
        self, pool: Pool, adapters: list[int], rows: Any, anomalous: Collection[int]
    ) -> dict[int, AdapterStep]:
        norms = torch.linalg.vector_norm(pool.gradients[rows], dim=1).tolist()  # the only wait for the device
        results = {}
        for adapter, norm in zip(adapters, norms, strict=True):
            lr = learning_rate(self.bank.specs[adapter], self.steps[adapter])
            results[adapter] = AdapterStep(lr, norm, skipped=adapter in anomalous or not isfinite(norm))
        moving = [adapter for adapter in adapters if not results[adapter].skipped]
        if moving:
            for adapter in moving:
                self.steps[adapter] += 1
            ((_, _, moving_rows),) = self.bank.by_pool(moving)
            self._update(pool, moving_rows, moving, [results[adapter] for adapter in moving])
            self._average(pool, moving)
        pool.gradients[rows] = 0.0
        return results

    def _update(
        self, pool: Pool, rows: Tensor | slice, adapters: list[int], steps: list[AdapterStep]
    ) -> None:
        coefficients = self._coefficients(pool, adapters, steps)
        clip, decay, rate, root, *others = coefficients.split(1, dim=1)
        groups = None
        if others:
            groups = pool.rate_columns(pool.values.device)
            for group, (its_decay, its_rate) in enumerate(
                zip(others[::2], others[1::2], strict=True), start=1
            ):
                decay = torch.where(groups == group, its_decay, decay)
                rate = torch.where(groups == group, its_rate, rate)
        if self.config.optimizer == "sgd":
            pool.values[rows] = (pool.values[rows] * decay).addcmul_(pool.gradients[rows] * clip, rate)
            return
        first, second = (pool.planes[name] for name in MOMENTS)
        if runs_in_triton(pool.values):
            from flora_train.kernels.adamw_triton import fused_adamw

            slots = torch.arange(len(adapters), device=self.bank.device) if isinstance(rows, slice) else rows
            fused_adamw(
                pool.values,
                pool.gradients,
                first,
                second=second,
                slots=slots,
                numbers=coefficients,
                groups=groups,
                betas=self.config.betas,
                eps=self.config.eps,
            )
            return
        beta1, beta2 = self.config.betas
        gradient = pool.gradients[rows] * clip
        m = first[rows].lerp_(gradient, 1.0 - beta1)
        v = second[rows].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        first[rows], second[rows] = m, v
        denominator = v.sqrt().div_(root).add_(self.config.eps)
        pool.values[rows] = (pool.values[rows] * decay).addcdiv_(m.mul(rate), denominator)

    def _average(self, pool: Pool, adapters: Iterable[int]) -> None:
        """Add the new weights to the averages of adapters with ema_decay.

        With weights w_1, ..., w_t after its own steps and decay d, the average is
        sum_i d^(t-i) w_i / sum_i d^(t-i): what Adam's bias correction makes of an average that begins at 0.
        """
        decays = {}
        for adapter in adapters:
            decay = self.bank.specs[adapter].ema_decay
            if decay is not None:
                decays[adapter] = decay
        if not decays:
            return
        shares = [[(1.0 - decay) / (1.0 - decay ** self.steps[a])] for a, decay in decays.items()]
        ((_, _, rows),) = self.bank.by_pool(decays)
        averages, values = pool.planes[AVERAGE], pool.values
        share = torch.tensor(shares, dtype=values.dtype, device=values.device)
        averages[rows] = averages[rows].addcmul_(values[rows] - averages[rows], share)

    @contextmanager
    def averaged_weights(self, adapters: Iterable[int]) -> Iterator[None]:
        """A context in which these adapters hold the averages of their weights, where they have them."""
        swapped = []
        for adapter in adapters:
            if self.bank.specs[adapter].ema_decay is not None and self.steps[adapter] > 0:
                swapped.append(adapter)
        self._swap_averages(swapped)
        try:
            yield
        finally:
            self._swap_averages(swapped)

    @torch.no_grad()
    def _swap_averages(self, adapters: Iterable[int]) -> None:
        for adapter in adapters:
            state = self.bank.state(adapter)
            values = state["values"].clone()
            state["values"].copy_(state[AVERAGE])
            state[AVERAGE].copy_(values)

    def _coefficients(self, pool: Pool, adapters: list[int], steps: list[AdapterStep]) -> Tensor:
        """Clip factor, weight decay factor, negative learning rate and root of the second bias correction:
        [adapters, 4]. Where an adapter has lr_ratio or head_lr, also decay factor and negative learning rate
        of B and of the head: [adapters, 8].
        """
        beta1, beta2 = self.config.betas if self.config.optimizer == "adamw" else (0.0, 0.0)
        specs = [self.bank.specs[adapter] for adapter in adapters]
        one_rate = all(spec.second_lr_ratio == 1.0 and spec.head_lr is None for spec in specs)
        rows = []
        for adapter, spec, step in zip(adapters, specs, steps, strict=True):
            count = self.steps[adapter]
            clip = min(1.0, (spec.max_grad_norm or inf) / (step.gradient_norm + 1e-6))
            decay = 1.0 - step.lr * spec.weight_decay
            rate = -step.lr / (1.0 - beta1**count)
            row = [clip, decay, rate, (1.0 - beta2**count) ** 0.5]
            for ratio in () if one_rate else (spec.second_lr_ratio, spec.head_lr_ratio):
                row += [1.0 - step.lr * ratio * spec.weight_decay, rate * ratio]
            rows.append(row)
        return torch.tensor(rows, dtype=pool.values.dtype, device=pool.values.device)


def learning_rate(spec: AdapterSpec, step: int) -> float:
    """The learning rate of the adapter's own step number `step` (from 0).

    Linear warm-up over `warmup_steps`, then constant, linear to zero or half a cosine to zero at `max_steps`.
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, spec.max_steps - spec.warmup_steps))
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + cos(pi * progress))}[
        spec.lr_schedule
    ]
    return spec.lr * factor


class TorchBankOptimizer(torch.optim.Optimizer):
    """A BankOptimizer with the interface of torch's optimizers.

    A step updates the adapters that have a gradient, each with its own learning rate and schedule, and clears
    those gradients. The `lr` of the parameter group and learning rate schedulers have no effect.

    Args:
        bank: The adapters.
        config: Optimizer, betas and eps.

    Raises:
        ValueError: The bank pages its adapters. Then the adapters of the next batches must be known in
        advance.
    """

    def __init__(self, bank: AdapterBank, config: TrainingConfig) -> None:
        if bank.pager is not None:
            raise ValueError(
                "a bank that pages can only be trained by flora_train's own loop, which plans the next "
                "batches"
            )
        self.rows = BankOptimizer(bank, config)
        super().__init__(
            [torch.zeros((), requires_grad=True)], {"lr": 0.0}
        )  # torch requires a parameter: a dummy

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move the adapters of all batches since the last step."""
        loss = None if closure is None else closure()
        bank = self.rows.bank
        self.rows.step([adapter for adapter in range(len(bank.specs)) if bank.gradient_row(adapter).any()])
        return loss

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A context in which adapters with ema_decay hold the averages of their weights, for evaluation and
        export.
        """
        return self.rows.averaged_weights(range(len(self.rows.bank.specs)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all adapters."""
        for pool in self.rows.bank.pools:
            pool.gradients.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Moments, values and step counts of all adapters."""
        return {**self.rows.state_dict(), "tensors": self.rows.bank.tensors(), "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for a bank with the same adapters."""
        self.rows.load_state_dict(state_dict)
        for name, tensor in self.rows.bank.tensors().items():
            tensor.copy_(state_dict["tensors"][name])


def sum_gradients(bank: AdapterBank, adapters: Iterable[int]) -> int:
    """Sum the gradients of these adapters over all processes, in place, with one exchange per pool.

    Every process passes the same adapters, also where it holds no row of one of them. Returns the bytes that
    this process sent: the gradients of these adapters, whatever the size of the bank.
    """
    sent = 0
    if not several_processes():
        return sent
    for pool, _, rows in bank.by_pool(adapters):
        gradients = pool.gradients[rows]
        dist.all_reduce(gradients)
        pool.gradients[rows] = gradients
        sent += gradients.nbytes
    return sent
