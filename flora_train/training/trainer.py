"""How does a run train? One readable loop: plan, forward, per-adapter losses, backward, per-adapter update."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import RowNoise
from flora_train.config.schema import RunConfig
from flora_train.data.batch import Row, collate, share_of_rank
from flora_train.data.task import Task, seed_of
from flora_train.training.distributed import is_main_process, sum_gradients, sum_over_processes, world
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.loss import RowLosses
from flora_train.training.optimizer import AdapterStep, BankOptimizer
from flora_train.training.plan import StepPlan, make_mixture, plan_step
from flora_train.training.progress import Watch
from flora_train.training.run_folder import RunFolder
from flora_train.training.selection import Selection


@dataclass
class Tally:
    """What has happened to each adapter so far, for the log."""

    tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    skipped: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    task_tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    recent_nats: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    recent_label_tokens: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    last: dict[int, AdapterStep] = field(default_factory=dict)


class Trainer:
    """Trains all adapters of a bank on their tasks. `accelerator` gives processes and trackers."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        bank: AdapterBank,
        tasks: Mapping[str, Task],
        pad_token: int,
        folder: RunFolder,
        accelerator: Any,
    ) -> None:
        self.config, self.model, self.bank, self.tasks = config, model, bank, tasks
        self.pad_token, self.folder, self.accelerator = pad_token, folder, accelerator
        self.row_losses = RowLosses(model)
        self.mixture = make_mixture(tasks, bank, config)
        self.optimizer = BankOptimizer(bank, config.training)
        self.selection = Selection(bank, folder.checkpoints, best=config.evaluation.select_best)
        self.tally = Tally()
        self.seconds = 0.0
        """Spent in steps, evaluations left out."""
        self._last_losses: dict[str, str] = {}

    def train(self) -> None:
        """Run every step; afterwards the bank holds each adapter's selected parameters."""
        total, log_every = self.config.training.steps, self.config.training.log_every
        every = self.config.evaluation.every or total
        done = 0
        self.model.train()
        with Watch("train", total) as watch:
            for number in range(total):
                plan = plan_step(self.mixture, number, self.tasks, self.bank, self.config.training.tokens_per_microbatch)
                if plan is None:
                    break
                started = time.monotonic()
                self.step(number, plan)
                self.seconds += time.monotonic() - started
                done = number + 1
                watch.update(done, self._facts(), force_line=done % log_every == 0)
                if done % log_every == 0:
                    self._log(done)
                if done % every == 0:
                    self._evaluate(done)
            if done % log_every:
                self._log(done)
            if done % every:
                self._evaluate(done)
        self.selection.restore()

    def step(self, number: int, plan: StepPlan) -> None:
        """One optimizer step: micro-batches accumulate, each adapter's loss is the mean over its own tokens of the
        whole step, on all processes (guarantee I1)."""
        nats = torch.zeros(len(self.bank.specs), dtype=torch.float64, device=self.bank.device)
        per_token = torch.zeros(len(self.bank.specs), device=self.bank.device)
        for adapter, tokens in plan.label_tokens.items():
            per_token[adapter] = 1.0 / tokens
        for rows in share_of_rank(plan.microbatches, *world()):
            batch = collate(rows, lambda task: self.tasks[task].train, self.pad_token).to(self.bank.device)
            self.bank.route(batch.adapter_ids, [self._noise(number, row) for row in rows])
            losses = self.row_losses(batch)
            (losses * per_token[batch.adapter_ids]).sum().backward()
            nats.index_add_(0, batch.adapter_ids, losses.detach().double())
        sum_gradients(self.bank, plan.label_tokens)
        self._count(plan, sum_over_processes(nats).tolist(), self.optimizer.step(plan.label_tokens))

    def _noise(self, number: int, row: Row) -> RowNoise:
        return RowNoise(seed_of(self.config.seed, f"dropout {number}", row.task, str(row.example)), row.length)

    def _count(self, plan: StepPlan, nats: list[float], steps: Mapping[int, AdapterStep]) -> None:
        tally = self.tally
        for rows in plan.microbatches:
            for row in rows:
                tally.tokens[row.adapter] += row.length
        for task, tokens in plan.task_tokens.items():
            tally.task_tokens[task] += tokens
        for adapter, tokens in plan.label_tokens.items():
            tally.recent_nats[adapter] += nats[adapter]
            tally.recent_label_tokens[adapter] += tokens
            tally.skipped[adapter] += steps[adapter].skipped
        tally.last.update(steps)

    def _log(self, done: int) -> None:
        tally = self.tally
        adapters = {
            self.bank.specs[a].name: {
                "loss": tally.recent_nats[a] / tally.recent_label_tokens[a],
                "lr": tally.last[a].lr,
                "gradient_norm": tally.last[a].gradient_norm,
                "tokens": tally.tokens[a],
                "skipped_steps": tally.skipped[a],
            }
            for a in tally.recent_label_tokens
        }
        tokens = sum(tally.tokens.values())
        record = {
            "kind": "step",
            "step": done,
            "seconds": round(self.seconds, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / self.seconds, 1),
            "task_tokens": dict(tally.task_tokens),
            "adapters": adapters,
        }
        self._record(record, {f"train/{name}/{key}": value for name, facts in adapters.items() for key, value in facts.items()})
        tally.recent_nats.clear()
        tally.recent_label_tokens.clear()

    def _evaluate(self, done: int) -> None:
        limit = self.config.evaluation.max_examples
        heldout = self.heldout(max_examples=limit)
        losses = {adapter: result.loss(adapter) for result in heldout.values() for adapter in result.nats}
        self.selection.offer(losses, done)
        adapters = {
            self.bank.specs[adapter].name: {"loss": result.loss(adapter), "bits_per_byte": result.bits_per_byte(adapter)}
            for result in heldout.values()
            for adapter in result.nats
        }
        record = {"kind": "evaluation", "step": done, "max_examples": limit, "adapters": adapters}
        self._record(record, {f"eval/{name}/{key}": value for name, facts in adapters.items() for key, value in facts.items()})

    def heldout(self, max_examples: int | None = None) -> dict[str, HeldOut]:
        """Held-out losses of every adapter as it stands in the bank now."""
        room = 2 * self.config.training.tokens_per_microbatch  # no activations are kept for a backward
        return evaluate_heldout(self.row_losses, self.bank, self.tasks.values(), room, self.pad_token, max_examples)

    def _record(self, record: dict[str, Any], scalars: dict[str, float]) -> None:
        if is_main_process():
            self.folder.append_metrics(record)
        self.accelerator.log(scalars, step=record["step"])

    def _facts(self) -> dict[str, str]:
        """Tokens per second and the mean recent loss of every method, for the progress line."""
        per_family: dict[str, list[float]] = defaultdict(list)
        tally = self.tally
        for adapter, tokens in tally.recent_label_tokens.items():
            per_family[self.bank.specs[adapter].family].append(tally.recent_nats[adapter] / tokens)
        for family, losses in per_family.items():
            self._last_losses[family] = f"{sum(losses) / len(losses):.3f}"
        return {"tok/s": f"{sum(tally.tokens.values()) / self.seconds:.0f}", **self._last_losses}
