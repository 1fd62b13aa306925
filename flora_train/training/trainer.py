"""How does a run train? One readable loop: plan, forward, per-adapter losses, backward, per-adapter update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import RowNoise
from flora_train.config.schema import RunConfig
from flora_train.data.batch import Collate, Row, collate, prefetch, share_of_rank
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.data.tokenization import TokenSplit
from flora_train.models.loading import set_mode
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.distributed import (
    on_any_process,
    on_every_process,
    on_main_process,
    share_from_main,
    sum_over_processes,
    wait_for_everyone,
    world,
)
from flora_train.runtime.progress import ProgressBar, share_and_eta
from flora_train.runtime.run_folder import RunFolder, comparable
from flora_train.runtime.signals import Interrupted, StopSignals
from flora_train.training.best_adapters import BestCheckpoint, Selection
from flora_train.training.checkpoint import Checkpoints, identity_of
from flora_train.training.early_stopping import EarlyStopping
from flora_train.training.fsdp import run_dummy_passes
from flora_train.training.guard import Guard
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.loss import RowLosses
from flora_train.training.metrics import TrainingMetrics, tracker_keys
from flora_train.training.optimizer import BankOptimizer, sum_gradients
from flora_train.training.packing_check import check_packing
from flora_train.training.prefetch import AdapterPrefetcher
from flora_train.training.resumable import Surroundings
from flora_train.training.step_plan import StepPlan, make_mixture, plan_step
from flora_train.training.step_timer import StepTimer
from flora_train.training.train_state import TrainState, renumbered

logger = logging.getLogger(__name__)


class Trainer:
    """Trains all adapters of a bank on their tasks. `accelerator` gives processes and trackers, `collate` makes batches."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        bank: AdapterBank,
        tasks: Mapping[str, Task],
        pad_token: int,
        folder: RunFolder,
        accelerator: Any,
        collate: Collate = collate,
        base_hash: str | None = None,
    ) -> None:
        self.config, self.model, self.bank, self.tasks = config, model, bank, tasks
        self.pad_token, self.folder, self.accelerator, self.collate = pad_token, folder, accelerator, collate
        self.clock = StepTimer(bank.device, config.training.log_every)
        self.row_losses = RowLosses(model, self.clock)
        for name in [name for name, task in tasks.items() if task.train.is_packed][:1]:
            check_packing(self.row_losses, name)
        self.joined = dict.fromkeys(tasks, 0)
        """Task -> the first step with it, counted from 0."""
        self.state = TrainState()
        self.early_stopping = EarlyStopping(bank.specs, config)
        self.replan()
        self.optimizer = on_every_process(lambda: BankOptimizer(bank, config.training))
        self.selection = Selection(bank, folder.best_adapters, best=config.evaluation.select_best)
        self.guard = Guard(bank, self.optimizer, config.guard)
        rows = {f"pool{i}": [spec.name for spec in pool.specs] for i, pool in enumerate(bank.pools)}
        self.checkpoints = Checkpoints(
            folder.checkpoints, config.training.keep_checkpoints, self.identity, rows, bank.copy_to_host
        )
        self.metrics = TrainingMetrics()
        self._base = cache(lambda: base_hash or fingerprint(model))  # made once: it reads the whole base
        self.signals = StopSignals()
        self._stop_requested = self._saving = False

    def train(self) -> None:
        """Run every step that is to do; then the bank holds each adapter's selected parameters. Raises Interrupted, saved, on SIGTERM or SIGINT."""
        config, state, begun = self.config.training, self.state, self.state.step
        every, rungs = self.config.evaluation.interval or self.end, self.early_stopping.halving.rungs
        set_mode(self.model, training=True)
        on_every_process(self.guard.snapshot)
        plan = self.plan(state.step)
        with self.signals, ProgressBar("train", self.end, begun) as watch:
            if not begun and self.config.evaluation.interval and any(spec.init_from for spec in self.bank.specs):
                self._evaluate(watch)  # what they were worth before
            if state.owes_evaluation(every, rungs) and self._evaluate(watch):  # a pause did not wait for it
                plan = self.plan(state.step)
            while state.step < self.end and plan is not None:
                coming = self.plan(state.step + 1) if state.step + 1 < self.end else None
                for rows in share_of_rank(coming.microbatches if coming else (), *world()):
                    prefetch(self.collate, rows, self.training_split)
                if self.clock.base_rate is None and (state.step > begun or coming is None):  # a run that goes on trains first
                    self.time_base(plan)
                started = time.monotonic()
                self.step(state.step, plan)
                self.finish_saving()  # a kill never costs more than save_every steps
                state.seconds += time.monotonic() - started
                state.step, plan = state.step + 1, coming
                watch.update(
                    state.step, self.metrics.facts(self.bank.specs, state.seconds), force_line=state.step % config.log_every == 0
                )
                if state.step % config.log_every == 0:
                    self._log()
                if state.step % config.save_every == 0 or state.step == self.end or self._stop_requested:
                    on_every_process(self.guard.snapshot)
                    self.save()  # before an evaluation: that may take long
                if self._stop_requested:
                    self.finish_saving()
                    wait_for_everyone()  # whoever ends first is taken for an accident by some launchers
                    raise Interrupted(state.step)
                if state.owes_evaluation(every, rungs) and self._evaluate(watch):
                    plan = self.plan(state.step)
            if state.logged < state.step:
                self._log()
            if state.evaluated < state.step:
                self._evaluate(watch)
            if state.step > begun:
                self.save()
            self.finish_saving()
            if on_any_process(self.signals.stop_requested, self.bank.device):  # during the last evaluation
                raise Interrupted(state.step)
        self.selection.restore()

    def save(self) -> None:
        """Begin to write a checkpoint of the whole training state. Raises UserError, on all processes, if the disk is full."""
        tensors, self._saving = self.bank.tensors(), True
        on_main_process(lambda: self.checkpoints.save(self.state.step, tensors, self._position()))

    def _position(self) -> dict[str, Any]:
        return {
            **asdict(self.state),
            "names": [spec.name for spec in self.bank.specs],
            "joined": self.joined,
            "optimizer_steps": self.optimizer.steps,
            "kept": [(adapter, kept.step, kept.loss) for adapter, kept in self.selection.kept.items()],
            "early_stopping": self.early_stopping.to_json(),
            "guard": self.guard.to_json(),
            "tally": self.metrics.to_json(),
            **self.folder.saved_metrics(),
        }

    def finish_saving(self) -> None:
        """Raises UserError, on all processes, if the disk is full."""
        if self._saving:
            self._saving = False
            on_main_process(self.checkpoints.wait)

    def resume(self) -> list[int]:
        """Take the state of the last good checkpoint, on all processes; without one, begin at the beginning.

        Returns the adapters that it does not know. Raises UserError if it is of another configuration, base model, data or adapter set.
        """
        tensors = self.bank.tensors()
        surroundings = Surroundings(self.folder)
        position = on_main_process(lambda: self.checkpoints.restore(tensors, surroundings.fault))
        on_main_process(lambda: self.folder.cut_metrics(position["metrics_size"] if position else 0))
        if position is None:
            logger.info("no checkpoint to go on from: beginning at step 1")
            return list(range(len(self.bank.specs)))
        share_from_main(tensors.values(), self.bank.device)
        self.bank.invalidate_device()
        unknown = [i for name, i in self.bank.ids.items() if name not in position["names"]]
        position = renumbered(position, self.bank.ids)
        self.state = TrainState(**{f.name: position[f.name] for f in fields(TrainState)})
        self.joined = {task: position["joined"].get(task, self.state.step) for task in self.tasks}
        self.optimizer.steps = position["optimizer_steps"]
        self.selection.take({adapter: BestCheckpoint(step, loss) for adapter, step, loss in position["kept"]})
        self.metrics = TrainingMetrics.from_json(position["tally"])
        self.early_stopping.take(position["early_stopping"])
        self.guard.take(position["guard"])
        self.replan()
        return unknown

    @property
    def end(self) -> int:
        """Steps of the run: training.steps from where the last task joined."""
        return max(self.joined.values()) + self.config.training.steps

    def identity(self, without: Collection[str] = ()) -> dict[str, Any]:
        """What this run, without these tasks, must have in common with what it goes on from."""
        data = {name: task.data_hash for name, task in self.tasks.items() if name not in without}
        return identity_of(comparable(self.config, without), self._base(), data)

    def step(self, number: int, plan: StepPlan) -> None:
        """Micro-batches accumulate; each adapter's loss is the mean over its own tokens of the whole step, on all processes (I1)."""
        clock = self.clock
        with clock.step(number), self.pages.held(number, plan.label_tokens):
            nats = torch.zeros(len(self.bank.specs) + 1, dtype=torch.float64, device=self.bank.device)
            per_token = torch.zeros(len(self.bank.specs), device=self.bank.device)
            for adapter, tokens in plan.label_tokens.items():
                per_token[adapter] = 1.0 / tokens
            for rows in share_of_rank(plan.microbatches, *world()):
                with clock.part("data"):
                    batch = self.collate(rows, self.training_split, self.pad_token).to(self.bank.device)
                clock.count_tokens(batch.padded_tokens)
                self.bank.route(batch.adapter_ids, [self.noise(number, row) for row in rows])
                losses = self.row_losses(batch)
                (losses * per_token[batch.adapter_ids]).sum().backward()
                nats.index_add_(0, batch.adapter_ids, losses.detach().double())
            run_dummy_passes(self.row_losses, self.bank, plan.microbatches)
            with clock.part("exchange"):
                nats[-1] = self.signals.stop_requested  # one process that was told to end tells all
                sent = sum_gradients(self.bank, plan.label_tokens)
                totals = sum_over_processes(nats).tolist()
            with clock.part("optimizer"):
                bad = self.guard.find_anomalies({adapter: totals[adapter] / n for adapter, n in plan.label_tokens.items()})
                steps = self.optimizer.step(plan.label_tokens, bad)
        self.metrics.count(plan, totals, steps, sent)
        self.guard.apply_policy(bad, steps, number + 1)
        self._stop_requested = totals[-1] > 0

    def time_base(self, plan: StepPlan) -> None:
        """Measure once what the base alone takes for a micro-batch, to tell apart what adapters cost. Nothing of the run changes."""
        rows = max(plan.microbatches, key=lambda rows: rows[0].length * len(rows))
        batch = self.collate(rows, self.training_split, self.pad_token).to(self.bank.device)
        with self.bank.without_adapters():
            self.clock.time_base(lambda: self.row_losses(batch).sum().backward(), batch.padded_tokens)

    def plan(self, number: int) -> StepPlan | None:
        return plan_step(self.mixture, number, self.tasks, self.bank, self.config.training.tokens_per_microbatch)

    def training_split(self, task: str) -> TokenSplit:
        return self.tasks[task].train

    def noise(self, number: int, row: Row) -> RowNoise:
        seed = seed_of(self.config.seed, f"dropout {number}", row.task, str(row.example))
        return RowNoise(seed, row.tokens - 1 if row.window else row.tokens, row.window)  # a decoder does not read the last token

    def _log(self) -> None:
        state, tokens = self.state, self.metrics.tokens.total()
        state.logged = state.step
        taken, back = self.metrics.flush(self.bank.specs), self.guard.rolled_back
        adapters = {name: {**facts, "rollbacks": back[self.bank.ids[name]]} for name, facts in taken.items()}
        record = {
            "kind": "step",
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / state.seconds, 1),
            "time_shares": {name: round(share, 4) for name, share in self.clock.shares().items()},
            "task_tokens": dict(self.metrics.task_tokens),
            "gradient_bytes_sent": self.metrics.sent["gradients"],
            "adapters": adapters,
            "quarantined": self.guard.record(),
        }
        self._record(record, tracker_keys("train", self.bank.specs, adapters))

    def _evaluate(self, watch: ProgressBar) -> bool:
        """Returns whether an adapter stops, and the steps to come are others than they were."""
        done, limit, started = self.state.step, self.config.evaluation.max_examples, time.monotonic()
        heldout = self.heldout(limit, lambda share: watch.update(done, {"evaluate": share_and_eta(share, started)}))
        losses = {adapter: result.loss(adapter) for result in heldout.values() for adapter in result.nats}
        self.selection.offer(losses, done)
        self.state.evaluated = done
        self.state.evaluation_seconds += time.monotonic() - started
        adapters = {
            self.bank.specs[adapter].name: {"loss": result.loss(adapter), "bits_per_byte": result.bits_per_byte(adapter)}
            for result in heldout.values()
            for adapter in result.nats
        }
        left, gone = self.early_stopping.after_evaluation(losses, done), self.early_stopping.record()
        record = {"kind": "evaluation", "step": done, "max_examples": limit, "adapters": adapters, "left": gone}
        self._record(record, tracker_keys("eval", self.bank.specs, adapters))
        if left:
            self.replan()
        return left

    def replan(self) -> None:
        """What steps to come will hold: who has joined, without who has left."""
        self.mixture = make_mixture(self.tasks, self.bank.specs, self.config, self.early_stopping.left, self.joined)
        self.pages = AdapterPrefetcher(self.bank, self.mixture, self.state.step, self.end)

    def heldout(self, max_examples: int | None, report: Callable[[float], None]) -> dict[str, HeldOut]:
        """Held-out losses of every adapter that has not left, as it stands in the bank now. report: called with the share done."""
        return evaluate_heldout(
            self.row_losses,
            self.bank,
            self.tasks.values(),
            2 * self.config.training.tokens_per_microbatch,  # no activations are kept for a backward
            self.pad_token,
            max_examples,
            report=report,
            collate=self.collate,
            absent=self.early_stopping.retired,
        )

    def _record(self, record: dict[str, Any], scalars: dict[str, float]) -> None:
        on_main_process(lambda: self.folder.append_metrics(record))
        self.accelerator.log(scalars, step=record["step"])
