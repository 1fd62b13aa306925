"""Local steps of many clients at once: each client's adapter learns from its own examples in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from flora_train.config.errors import user_error
from flora_train.data.mixture import Draw
from flora_train.data.splits import seed_of
from flora_train.models.loading import set_mode
from flora_train.training.step_plan import plan_draws
from flora_train.training.trainer import Trainer

ROUND_STEPS = 1_000_000
"""Step numbers of a round. Dropout and noise depend on them, and never on which other clients take part."""


@dataclass(frozen=True)
class Client:
    """One client: an adapter of the bank, and the examples that it alone learns from."""

    name: str
    adapter: str
    """Name of its adapter, whose task holds its examples."""
    examples: tuple[int, ...]
    """Positions in the training split of that task."""


@dataclass(frozen=True)
class LocalSteps:
    """What a client does in a round."""

    batch_examples: int = 8
    """Examples of a step."""
    epochs: int = 1
    """Passes over its examples, unless `steps` is given."""
    steps: int | None = None
    """Steps of every client, whatever the number of its examples."""

    def __post_init__(self) -> None:
        for key, value in (("batch_examples", self.batch_examples), ("epochs", self.epochs)):
            if value < 1:
                raise user_error(f"federated.{key}", value, "must be at least 1")
        if self.steps is not None and not 1 <= self.steps < ROUND_STEPS:
            raise user_error("training.steps", self.steps, f"must be 1 to {ROUND_STEPS - 1:,}")

    def batches(self, client: Client, round_number: int, seed: int) -> list[tuple[int, ...]]:
        """The examples of each step of one client, which depend on seed, client and round alone."""
        count = len(client.examples)
        generator = np.random.default_rng(seed_of(seed, "local order", client.name, str(round_number)))
        batches: list[tuple[int, ...]] = []
        per_epoch = -(-count // self.batch_examples)
        needed = self.epochs * per_epoch if self.steps is None else self.steps
        while len(batches) < needed:
            order = [client.examples[i] for i in generator.permutation(count)]
            starts = range(0, count, self.batch_examples)
            batches += [tuple(order[start : start + self.batch_examples]) for start in starts]
        return batches[:needed]


@dataclass(frozen=True)
class LocalResult:
    """What local training did to one client."""

    steps: int
    skipped: int
    """Steps without an update, because loss or gradient were not finite."""
    loss: float
    """Mean loss over its steps."""

    @property
    def failure(self) -> str | None:
        """Why its values are worth nothing; None if they are."""
        if self.skipped < self.steps:
            return None
        return f"none of its {self.steps} steps had a finite loss and gradient"


def train_clients(
    trainer: Trainer,
    clients: Sequence[Client],
    local: LocalSteps,
    *,
    round_number: int,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, LocalResult]:
    """Train these clients' adapters from their present values, all in the same forward passes.

    Each begins with a fresh optimizer, as a client does that kept nothing of an earlier round.

    Args:
        trainer: Its bank has the adapters, its tasks the examples.
        clients: Different clients.
        local: Steps and batch size.
        round_number: The round, from 0.
        seed: Of the order of examples.
        after_step: Called after every step.

    Returns:
        Client -> what was done.
    """
    ids = {client.name: trainer.bank.ids[client.adapter] for client in clients}
    trainer.optimizer.reset(ids.values())
    trainer.guard.forget(ids.values())
    trainer.guard.snapshot()
    trainer.metrics.flush()
    skipped_before = {adapter: trainer.metrics.skipped[adapter] for adapter in ids.values()}
    set_mode(trainer.model, training=True)
    batches = [local.batches(client, round_number, seed) for client in clients]
    for step, examples_of in enumerate(zip_longest(*batches)):
        draws = []
        for client, examples in zip(clients, examples_of, strict=True):
            if examples is not None:
                task = trainer.bank.specs[ids[client.name]].task
                draws.append(Draw(task, examples, (client.adapter,)))
        _train_step(trainer, draws, number=round_number * ROUND_STEPS + step, seed=seed)
        after_step()
    losses = trainer.metrics.recent_losses()
    results = {}
    for client, own in zip(clients, batches, strict=True):
        adapter = ids[client.name]
        skipped = trainer.metrics.skipped[adapter] - skipped_before[adapter]
        results[client.name] = LocalResult(len(own), skipped, losses[adapter])
    trainer.metrics.flush()
    return results


def _train_step(trainer: Trainer, draws: Sequence[Draw], *, number: int, seed: int) -> None:
    max_tokens = trainer.config.training.tokens_per_microbatch
    plan = plan_draws(draws, trainer.tasks, trainer.bank, number=number, seed=seed, max_tokens=max_tokens)
    assert plan is not None
    trainer.step(number, plan)
