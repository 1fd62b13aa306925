"""The state of a training run, its checkpoints, and how a run is resumed or extended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from flora_train.config.json_format import JsonObject
from flora_train.runtime.checksum import fingerprint
from flora_train.runtime.config_changes import comparable
from flora_train.runtime.distributed import on_every_process, on_main_process, share_from_main
from flora_train.training.add_tasks import FinishedRun
from flora_train.training.best_adapters import BestAdapters
from flora_train.training.checkpoint import Checkpoints, identity_of
from flora_train.training.checkpoint_dependencies import CheckpointDependencies
from flora_train.training.context import TrainingContext
from flora_train.training.early_stopping import EarlyStopping
from flora_train.training.guard import Guard
from flora_train.training.metrics import TrainingMetrics
from flora_train.training.optimizer import BankOptimizer
from flora_train.training.prefetch import AdapterPrefetcher
from flora_train.training.references import prepare_references
from flora_train.training.step_plan import StepPlan, make_mixture, plan_step
from flora_train.training.train_state import TrainState

logger = logging.getLogger(__name__)


class ResumableTraining:
    """Everything that a checkpoint restores, and the plan of the steps that follow from it."""

    def __init__(self, context: TrainingContext) -> None:
        self.context = context
        self.config, self.folder, self.tasks = context.config, context.folder, context.tasks
        self.model, self.bank = context.model, context.bank
        config, bank = self.config, self.bank
        self.state = TrainState()
        self.joined = dict.fromkeys(self.tasks, 0)
        """Task -> the first step with it, counted from 0."""
        self.early_stopping = EarlyStopping(bank.specs, config)
        self.replan()
        self.optimizer = on_every_process(lambda: BankOptimizer(bank, config.training))
        self.best_adapters = BestAdapters(
            bank, self.folder.best_adapters, select_best=config.evaluation.select_best
        )
        self.guard = Guard(bank, self.optimizer, config.guard)
        self.metrics = TrainingMetrics(bank.specs)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            keep=config.training.keep_checkpoints,
            identity=self.identity,
            rows={f"pool{i}": [spec.name for spec in pool.specs] for i, pool in enumerate(bank.pools)},
            copy=bank.copy_to_host,
        )
        self._saving = False
        self._base_hash = cache(
            lambda: context.base_hash or fingerprint(self.model)
        )  # reads the whole base, once

    def state_dict(self) -> dict[str, Any]:
        """All training state but the bank's tensors, keyed by adapter name; size and hash of the metrics
        file.
        """
        return {
            "progress": asdict(self.state),
            "joined": self.joined,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best_adapters.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "guard": self.guard.state_dict(),
            "metrics": self.metrics.state_dict(),
            **self.folder.saved_metrics(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a run that may have lacked some of the adapters."""
        self.state = TrainState(**state["progress"])
        self.joined = {task: state["joined"].get(task, self.state.step) for task in self.tasks}
        self.optimizer.load_state_dict(state["optimizer"])
        self.best_adapters.load_state_dict(state["best"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.guard.load_state_dict(state["guard"])
        self.metrics.load_state_dict(state["metrics"])
        self.replan()

    def save(self) -> None:
        """Begin to write a checkpoint of the whole training state. Raises UserError, on all processes, if the
        disk is full.
        """
        tensors, self._saving = self.bank.tensors(), True
        on_main_process(lambda: self.checkpoints.save(self.state.step, tensors, self.state_dict()))

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written. Raises UserError, on all processes, if the disk is
        full.
        """
        if self._saving:
            self._saving = False
            on_main_process(self.checkpoints.wait)

    def resume(self) -> list[int]:
        """Load the last good checkpoint on all processes; without one, begin at step 1.

        Returns the adapters that are not in it. Raises UserError if it is of another configuration, base
        model, data or adapter set.
        """
        tensors, dependencies = self.bank.tensors(), CheckpointDependencies(self.folder)
        state = on_main_process(lambda: self.checkpoints.restore(tensors, dependencies.find_problem))
        metrics_size = 0 if state is None else state["metrics_size"]
        on_main_process(lambda: self.folder.cut_metrics(metrics_size))
        if state is None:
            logger.info("no checkpoint to resume from: beginning at step 1")
            return list(range(len(self.bank.specs)))
        share_from_main(tensors.values(), self.bank.device)
        self.bank.invalidate_device()
        self.load_state_dict(state)
        return [adapter for name, adapter in self.bank.ids.items() if name not in state["optimizer"]["steps"]]

    def extend(self, finished_run: FinishedRun, init_adapters: Callable[[list[int]], None]) -> None:
        """Begin after the last step of a finished run, whose adapters stay unchanged, and save a
        checkpoint.

        Call it before the folder is claimed: a kill then leaves the finished run as it was. init_adapters:
        initialises the adapters that are added.
        """
        self.load_state_dict(finished_run.state_dict())
        init_adapters([adapter for name, adapter in self.bank.ids.items() if name not in finished_run.best])
        added = [task for task, step in self.joined.items() if step == self.state.step]
        unchanged = len(finished_run.best)
        logger.info(
            f"{', '.join(added)} join after step {self.state.step}; {unchanged} adapters stay unchanged"
        )
        self.save()
        self.finish_saving()

    @property
    def end(self) -> int:
        """Steps of the run: training.steps from where the last task joined."""
        return max(self.joined.values()) + self.config.training.steps

    def identity(self, without: Collection[str] = ()) -> JsonObject:
        """What this run, without the named tasks, must have in common with what it continues."""
        data = {name: task.data_hash for name, task in self.tasks.items() if name not in without}
        return identity_of(comparable(self.config, without), self._base_hash(), data)

    def replan(self) -> None:
        """Plan the following steps from the tasks that have joined and the adapters that have not retired."""
        absent = self.early_stopping.first_absent_steps
        self.mixture = make_mixture(self.tasks, self.bank.specs, self.config, absent, self.joined)
        self.prefetcher = AdapterPrefetcher(self.bank, self.mixture, self.state.step, self.end)

    def prepare_references(
        self, init_adapters: Callable[[list[int]], None], fresh: Collection[int] = ()
    ) -> None:
        """Compute the references that preferences need before training, or read them from disk.

        init_adapters: loads the initial state of adapters with init_from; fresh: adapters that are in it.
        """
        prepare_references(
            self.context,
            base_hash=self._base_hash,
            init_adapters=init_adapters,
            fresh=fresh,
            trained_on=self._examples_trained_on(),
        )

    def _examples_trained_on(self) -> dict[str, Collection[int]]:
        """Preference task -> the training examples that the rest of the run may draw."""
        examples: dict[str, Collection[int]] = {}
        for name, task in self.tasks.items():
            if task.preference is not None:
                examples[name] = range(len(task.train))
        if not examples or self.early_stopping.may_retire:
            return examples
        drawn: dict[str, set[int]] = {name: set() for name in examples}
        for number in range(self.state.step, self.end):
            for draw in self.mixture.step(number):
                if draw.task in drawn:
                    drawn[draw.task].update(draw.examples)
            if all(len(drawn[name]) == len(every) for name, every in examples.items()):
                break
        return dict(drawn)

    def plan(self, number: int) -> StepPlan | None:
        """The rows of step `number`, counted from 0; None when no adapter is left."""
        return plan_step(
            self.mixture, number, self.tasks, self.bank, self.config.training.tokens_per_microbatch
        )
