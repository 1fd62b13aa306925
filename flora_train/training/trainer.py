"""The training loop: plan a step, compute every adapter's loss and gradients, update every adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flora_train.adapters.routed.balance import balance_losses
from flora_train.adapters.routed.gate_loss import gate_losses
from flora_train.adapters.routing import RowNoise
from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import MixedBatch, Row, padded_tokens, prefetch, share_of_rank
from flora_train.data.splits import seed_of
from flora_train.data.token_split import TokenSplit
from flora_train.models.loading import set_mode, without_checkpointing
from flora_train.runtime.distributed import (
    on_any_process,
    on_every_process,
    on_main_process,
    sum_over_processes,
    wait_for_everyone,
    world,
)
from flora_train.runtime.metric_records import EvaluationRecord, Record, StepRecord
from flora_train.runtime.progress import ProgressBar, share_and_time_left
from flora_train.runtime.signals import Interrupted, StopSignals
from flora_train.training.choice_scores import ChoiceScores, score_choices
from flora_train.training.context import TrainingContext
from flora_train.training.fsdp import run_dummy_frozen_pass, run_dummy_passes
from flora_train.training.gate_goals import GateGoals
from flora_train.training.heldout import HeldOut, evaluate_heldout, heldout_metrics
from flora_train.training.label_loss import LabelLosses
from flora_train.training.loss import RowLosses
from flora_train.training.metrics import MetricLogger, NullMetricLogger, tracker_keys
from flora_train.training.objectives import ROUTER_LOSS, MicrobatchLoss, RowNats, StepSums, StepTotals
from flora_train.training.optimizer import sum_gradients
from flora_train.training.packing_check import check_packing
from flora_train.training.pooling import sum_of
from flora_train.training.resumable import ResumableTraining
from flora_train.training.selection import measured
from flora_train.training.step_plan import StepPlan
from flora_train.training.step_timer import StepTimer

FORWARDS_PER_STEP = 3
"""Cost of a forward and backward, in forwards."""


class Trainer(ResumableTraining):
    """Trains all adapters of a bank on their tasks. ResumableTraining holds its state."""

    def __init__(self, context: TrainingContext, metric_logger: MetricLogger | None = None) -> None:
        super().__init__(context)
        self.metric_logger: MetricLogger = metric_logger or NullMetricLogger()
        self.timer = StepTimer(self.bank.device, self.config.training.log_every)
        self.row_losses = RowLosses(self.model, self.timer, labels=LabelLosses(self.bank, self.tasks))
        self.task_of = [self.tasks[spec.task] for spec in self.bank.specs]
        """The task of each adapter."""
        self.gate_goals = GateGoals(self.bank, self.tasks)
        self.microbatch_loss = MicrobatchLoss(self.tasks, context.references)
        packed = [name for name, task in self.tasks.items() if task.train.is_packed]
        if packed:
            check_packing(self.row_losses, packed[0])
        self.signals = StopSignals()
        self.stop_requested = False
        """Whether any process was asked to stop, as of the last step."""
        self.next_plan: StepPlan | None = None
        self._first_step = 0
        """The first step of this sitting, counted from 0."""

    def train(self) -> None:
        """Run all remaining steps; then the bank holds the selected parameters of each adapter.

        Raises Interrupted, with a checkpoint saved, on SIGTERM or SIGINT.
        """
        state = self.state
        self._first_step = state.step
        log_every, save_every = self.config.training.log_every, self.config.training.save_every
        set_mode(self.model, training=True)
        on_every_process(self.guard.snapshot)
        with self.signals, ProgressBar("train", self.end, state.step) as progress:
            if self._starts_from_trained_adapters():
                self.evaluate(progress)
            if self._evaluation_is_due():  # the checkpoint was saved before its evaluation
                self.evaluate(progress)
            self.next_plan = self.plan(state.step)
            while state.step < self.end and self.next_plan is not None:
                self.train_step()
                is_due = state.step % log_every == 0
                progress.update(state.step, self.metrics.summary(state.seconds), force_line=is_due)
                if is_due:
                    self.log()
                if state.step % save_every == 0 or state.step == self.end or self.stop_requested:
                    on_every_process(self.guard.snapshot)
                    self.save()  # before an evaluation, which may take long
                if self.stop_requested:
                    self.finish_saving()
                    wait_for_everyone()  # some launchers treat the first exit as a failure
                    raise Interrupted(state.step)
                if self._evaluation_is_due():
                    self.evaluate(progress)
            if state.logged < state.step:
                self.log()
            if state.evaluated < state.step:
                self.evaluate(progress)
            if state.step > self._first_step:
                self.save()
            self.finish_saving()
            if on_any_process(self.signals.stop_requested, self.bank.device):  # during the last evaluation
                raise Interrupted(state.step)
        self.best_adapters.restore()

    def train_step(self) -> None:
        """Train on the next plan, while the batches of the one after it are prepared."""
        state, plan = self.state, self.next_plan
        assert plan is not None
        self.next_plan = self.plan(state.step + 1) if state.step + 1 < self.end else None
        if self.next_plan is not None:
            for rows in share_of_rank(self.next_plan.microbatches, *world()):
                prefetch(self.context.collate, rows, self.training_split)
        is_warm = state.step > self._first_step or self.next_plan is None
        if self.timer.base_rate is None and is_warm:
            self.time_base(plan)
        started = time.monotonic()
        self.step(state.step, plan)
        self.finish_saving()  # a kill never costs more than save_every steps
        state.seconds += time.monotonic() - started
        state.step += 1

    def step(self, number: int, plan: StepPlan) -> None:
        """Accumulate the micro-batches of a step and update its adapters. Each adapter's loss is the mean
        over its own tokens, pairs or labelled completions of the whole step, on all processes (I1).
        """
        with self.timer.step(number), self.prefetcher.resident(number, plan.label_tokens):
            sums = self._accumulate_gradients(number, plan)
            with self.timer.part("exchange"):
                stop = sums.new_tensor([self.signals.stop_requested])  # a signal to one process stops all
                bytes_sent = sum_gradients(self.bank, plan.label_tokens)
                *flat, stops = sum_over_processes(torch.cat([sums.flatten(), stop])).tolist()
            with self.timer.part("optimizer"):
                totals = StepTotals(plan, flat, self.task_of)
                anomalies = self.guard.find_anomalies(totals.losses)
                updates = self.optimizer.step(plan.label_tokens, anomalies)
        self.metrics.count(plan, totals, updates, bytes_sent)
        self.guard.apply_policy(anomalies, updates, number + 1)
        self.stop_requested = stops > 0

    def _accumulate_gradients(self, number: int, plan: StepPlan) -> Tensor:
        """Forward and backward of this process's micro-batches; sums by adapter id, float64 [adapters,
        COLUMNS].
        """
        sums = StepSums(len(self.bank.specs), self.bank.device)
        for i, rows in enumerate(share_of_rank(plan.microbatches, *world())):
            frozen = self.frozen_pass(rows)
            if frozen is None:
                run_dummy_frozen_pass(self.row_losses, self.bank, plan.microbatches, i)
            learnt = self.learnt_pass(rows, number, plan)
            self._count_router_losses(sums)
            self.microbatch_loss(learnt, frozen, plan=plan, sums=sums).backward()
        run_dummy_passes(self.row_losses, self.bank, plan.microbatches)
        return sums.sums

    def _count_router_losses(self, sums: StepSums) -> None:
        """Add the losses of the routers and gates in the forward that has just run."""
        routing = self.bank.router.routing
        if routing is None:
            return
        losses = balance_losses(routing) | gate_losses(routing)
        for name, loss in losses.items():
            adapter = torch.tensor([self.bank.ids[name]], device=loss.device)
            sums.add(ROUTER_LOSS, adapter, loss[None])

    def frozen_pass(self, rows: Sequence[Row]) -> RowNats | None:
        """The forward of the rows that get no gradient, without dropout; None if there are none."""
        frozen = [row for row in rows if row.frozen]
        if not frozen:
            return None
        with self.timer.part("data"):
            batch = self.make_batch(frozen)
        self.timer.count_tokens(batch.padded_tokens // FORWARDS_PER_STEP)
        with torch.no_grad(), self.bank.routed(batch.adapter_ids), without_checkpointing(self.model):
            return RowNats(frozen, self.row_losses(batch))

    def learnt_pass(self, rows: Sequence[Row], number: int, plan: StepPlan) -> RowNats:
        """The forward of the other rows, with the noise of step `number`."""
        learnt = [row for row in rows if not row.frozen]
        with self.timer.part("data"):
            batch = self.make_batch(learnt)
        self.timer.count_tokens(batch.padded_tokens)
        noise = [self.noise(number, row) for row in learnt]
        draws = [plan.draw_of(row) for row in learnt]
        lengths = [row.tokens for row in learnt]
        goals = [self.gate_goals.of_row(row, plan) for row in learnt]
        self.bank.route(batch.adapter_ids, noise, draws, lengths, goals=goals)
        outputs = self.row_losses.outputs(batch)
        return RowNats(learnt, outputs.nats, outputs.embeddings)

    def log(self) -> None:
        """Write a record of the steps since the last one."""
        state, metrics = self.state, self.metrics
        state.logged = state.step
        tokens = metrics.tokens.total()
        adapters = metrics.flush()
        for name, entry in adapters.items():
            entry["rollbacks"] = self.guard.rolled_back[self.bank.ids[name]]
        record: StepRecord = {
            "kind": "step",
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "tokens": tokens,
            "tokens_per_second": round(tokens / state.seconds, 1),
            "time_shares": {part: round(share, 4) for part, share in self.timer.shares().items()},
            "task_tokens": dict(metrics.task_tokens),
            "gradient_bytes_sent": metrics.gradient_bytes_sent,
            "adapters": adapters,
            "quarantined": self.guard.record(),
        }
        self._record(record, tracker_keys("train", self.bank.specs, adapters))

    def evaluate(self, progress: ProgressBar) -> None:
        """Evaluate the active adapters on held-out examples (the averages of those with ema_decay), save
        those that improved, and retire those that are to stop; then the following steps are planned again.
        """
        state, limit, started = self.state, self.config.evaluation.max_examples, time.monotonic()

        def report(share: float) -> None:
            progress.update(state.step, {"evaluate": share_and_time_left(share, started)})

        losses: dict[int, float] = {}
        adapters: dict[str, dict[str, float]] = {}
        active = [i for i in range(len(self.bank.specs)) if i not in self.early_stopping.retired]
        with self.optimizer.averaged_weights(active):
            results = self.heldout(limit, report)
            selections, words = self.context.selections, self.scores_of_words(limit)
            # functions of the user's own need not be deterministic
            figures = on_main_process(lambda: measured(selections, results, words))
            for result in results.values():
                for adapter in result.nats:
                    if adapter == BASE_ID:  # the reference
                        continue
                    losses[adapter] = result.objective_loss(adapter)
                    adapters[self.bank.specs[adapter].name] = heldout_metrics(result, adapter)
            scores: dict[int, float] = {}
            for adapter, value in figures.items():
                selection = selections[self.bank.specs[adapter].task]
                scores[adapter] = selection.score(value)
                adapters[self.bank.specs[adapter].name][selection.figure.replace(":", ".")] = value
            self.best_adapters.offer(losses, state.step, scores)
        state.evaluated = state.step
        state.evaluation_seconds += time.monotonic() - started
        some_retire = self.early_stopping.after_evaluation({**losses, **scores}, state.step)
        record: EvaluationRecord = {
            "kind": "evaluation",
            "step": state.step,
            "max_examples": limit,
            "adapters": adapters,
            "left": self.early_stopping.record(),
        }
        self._record(record, tracker_keys("eval", self.bank.specs, adapters))
        if some_retire:
            self.replan()
            self.next_plan = self.plan(state.step)

    def heldout(self, max_examples: int | None, report: Callable[[float], None]) -> dict[str, HeldOut]:
        """Held-out losses of the active adapters, with their present parameters. report: called with the
        share done.
        """
        return evaluate_heldout(
            self.row_losses,
            self.bank,
            self.tasks.values(),
            max_tokens=2
            * self.config.training.tokens_per_microbatch,  # no activations are kept for a backward
            pad_token=self.context.pad_token,
            max_examples=max_examples,
            report=report,
            collate=self.context.collate,
            absent=self.early_stopping.retired,
            references=self.context.references,
        )

    def scores_of_words(self, max_examples: int | None) -> dict[str, ChoiceScores]:
        """The scores of held-out words, of the tasks whose best states are selected by them."""
        tasks = {name: self.tasks[name] for name, one in self.context.selections.items() if one.of_words}
        return score_choices(
            self.row_losses,
            self.bank,
            tasks,
            max_tokens=2 * self.config.training.tokens_per_microbatch,
            pad_token=self.context.pad_token,
            max_examples=max_examples,
            collate=self.context.collate,
            absent=self.early_stopping.retired,
            during_training=True,
        )

    def time_base(self, plan: StepPlan) -> None:
        """Measure once how long the base alone takes for a micro-batch, so that the cost of the adapters can
        be reported. The state of the run does not change.
        """
        largest = max(plan.microbatches, key=padded_tokens)
        batch = self.make_batch([row for row in largest if not row.frozen])
        with self.bank.without_adapters():
            self.timer.time_base(
                lambda: sum_of(self.row_losses.outputs(batch)).backward(), batch.padded_tokens
            )

    def make_batch(self, rows: Sequence[Row]) -> MixedBatch:
        return self.context.collate(rows, self.training_split, self.context.pad_token).to(self.bank.device)

    def training_split(self, task: str) -> TokenSplit:
        return self.tasks[task].train

    def noise(self, number: int, row: Row) -> RowNoise:
        """The dropout and NEFTune noise of a row in step `number`."""
        spec = self.bank.specs[row.adapter]
        row_name = str(row.example)
        if row.document:
            row_name = f"{row.example} {row.document}"
        seed = seed_of(spec.seed_in(self.config.seed), f"dropout {number}", row.task, row_name)
        tokens = row.tokens - 1 if row.window else row.tokens  # a decoder does not read the last token
        documents: tuple[int, ...] = ()
        split = self.training_split(row.task)
        if spec.neftune_noise_alpha and split.is_packed:
            documents = tuple(len(document) for document, *_ in split.documents(row.example))
        return RowNoise(seed, tokens, row.window, documents)

    def _starts_from_trained_adapters(self) -> bool:
        """Whether the adapters' losses before training are worth an evaluation."""
        initialised = any(spec.init_from for spec in self.bank.specs)
        return self.state.step == 0 and self.config.evaluation.interval is not None and initialised

    def _evaluation_is_due(self) -> bool:
        interval = self.config.evaluation.interval or self.end
        return self.state.evaluation_is_due(interval, self.early_stopping.halving.rungs)

    def _record(self, record: Record, scalars: dict[str, float]) -> None:
        on_main_process(lambda: self.folder.append_metrics(record))
        self.metric_logger.log(scalars, step=record["step"])
