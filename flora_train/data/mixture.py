"""The examples of every step: a pure function of the configuration, the seed, early stopping and the step
number.

A draw takes the next examples of one task. All adapters of that task learn from them in the same step, so
that methods are compared on the same examples in the same order. A step is filled with draws up to its token
budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from flora_train.config.errors import Problem, UserError
from flora_train.config.training_schema import MixtureConfig
from flora_train.data.splits import seed_of

TURN_STEPS = 20
"""Default of mixture.turn_steps."""


@dataclass(frozen=True)
class Stream:
    """A task as the mixture sees it."""

    name: str
    lengths: NDArray[np.int64]
    """int64 [n]: tokens of each training example."""
    weight: float
    """Share relative to other tasks."""
    max_steps: Mapping[str, int]
    """Adapter name -> number of its own steps."""
    begins: int = 0
    """First step in which it is drawn."""
    ends: float = inf
    """First step after the last one in which it is drawn."""
    shared: NDArray[np.int64] | None = None
    """int64 [n]: further tokens of each example, whatever the number of adapters that learn from it."""

    def tokens(self, examples: Sequence[int], adapters: int) -> int:
        """Tokens of these examples for this many adapters."""
        chosen = list(examples)
        tokens = int(self.lengths[chosen].sum()) * adapters
        if self.shared is not None:
            tokens += int(self.shared[chosen].sum())
        return tokens


@dataclass(frozen=True)
class Draw:
    """Examples of one task, and the adapters that learn from them."""

    task: str
    examples: tuple[int, ...]
    adapters: tuple[str, ...]


class TaskMixture:
    """Draws grouped into steps. A task whose adapters are all retired is no longer drawn, and the others
    share its part.

    left: adapter name -> the first step without it, for adapters that were retired before their max_steps.
    Raises UserError if a step cannot hold one draw.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        config: MixtureConfig,
        tokens_per_step: int,
        seed: int,
        left: Mapping[str, int] | None = None,
    ) -> None:
        self.streams = tuple(streams)
        self.config = config
        self.tokens_per_step = tokens_per_step
        self.seed = seed
        self.left = left or {}
        self._check_budget()
        self._places = {stream.name: i for i, stream in enumerate(self.streams)}
        self._begins = np.array([stream.begins for stream in self.streams], dtype=np.float64)
        self._ends = np.array([stream.ends for stream in self.streams], dtype=np.float64)
        self._teaches = np.ones(len(self.streams), dtype=np.bool_)
        """Whether some adapter of each task is still trained."""
        self._losing = {
            i for i, stream in enumerate(self.streams) if self.left.keys() & stream.max_steps.keys()
        }
        self._unsure = set(range(len(self.streams)))
        """Tasks whose `_teaches` may have changed."""
        self._queues: list[Iterator[int]] = [_endless_examples(stream, seed) for stream in streams]
        self._random = np.random.default_rng(seed_of(seed, "mixture"))
        self._served = np.zeros(len(streams))
        self._steps_taken: Counter[str] = Counter()
        self._postponed: tuple[int, tuple[int, ...]] | None = None
        self._steps: list[tuple[Draw, ...]] = []
        self._turn: NDArray[np.bool_] | None = None

    def step(self, number: int) -> tuple[Draw, ...]:
        """The draws of step `number` (from 0), at most tokens_per_step tokens; empty once all adapters are
        retired."""
        while len(self._steps) <= number:
            self._steps.append(self._fill_step())
        return self._steps[number]

    def target_shares(self) -> dict[str, float]:
        """Share of every task that the strategy aims at: of examples, or of tokens with `fair`."""
        weights = self._weights()
        return {s.name: float(w) for s, w in zip(self.streams, weights / weights.sum(), strict=True)}

    def token_shares(self) -> dict[str, float]:
        """Expected share of all tokens of every task: by weight with `fair`, else by draws x mean length,
        among the tasks that are drawn at the same time.
        """
        expected = self._weights()
        if self.config.strategy != "fair":
            expected = expected * np.array([stream.lengths.mean() for stream in self.streams])
        last = max((stream.ends for stream in self.streams if stream.ends < inf), default=0)
        last = max(last, 1 + max(stream.begins for stream in self.streams))
        shares = np.zeros(len(self.streams))
        for start, end in pairwise(sorted({t for s in self.streams for t in (s.begins, min(s.ends, last))})):
            live = np.array([stream.begins <= start < stream.ends for stream in self.streams])
            now = np.where(live, expected, 0.0)
            shares += (end - start) * now / max(now.sum(), 1e-300)
        return {s.name: float(w) for s, w in zip(self.streams, shares / shares.sum(), strict=True)}

    def tokens_of(self, draw: Draw) -> int:
        """Tokens of a draw for all its adapters."""
        return self.streams[self._places[draw.task]].tokens(draw.examples, len(draw.adapters))

    def _fill_step(self) -> tuple[Draw, ...]:
        self._let_join()
        draws: list[Draw] = []
        budget = self.tokens_per_step
        live = self._at_turn(self._live())
        while (choice := self._postponed or self._choose(live)) is not None:
            self._postponed = None
            index, examples = choice
            stream = self.streams[index]
            adapters = self._learners(stream)
            if not adapters:
                continue
            budget -= stream.tokens(examples, len(adapters))
            if budget < 0:
                self._postponed = choice
                break
            draws.append(Draw(stream.name, examples, adapters))
        drawn = {draw.task for draw in draws}
        self._steps_taken.update(drawn)
        self._unsure |= {self._places[task] for task in drawn}
        return tuple(draws)

    def _live(self) -> NDArray[np.bool_]:
        """The tasks that some adapter learns in the step that is filled now, [tasks]. Only tasks that may
        have changed are looked at."""
        now = len(self._steps)
        for i in self._unsure | self._losing:
            self._teaches[i] = bool(self._still_learning(self.streams[i]))
        self._unsure = set()
        return (self._begins <= now) & (now < self._ends) & self._teaches

    def _let_join(self) -> None:
        """A task that joins late starts at the minimum served count, so that it does not dominate."""
        now = len(self._steps)
        joining = np.flatnonzero(self._begins == now) if now > 0 else ()
        if not len(joining):
            return
        there = [
            self._served[i]
            for i, stream in enumerate(self.streams)
            if stream.begins < now and self._learners(stream)
        ]
        for i in joining if there else ():
            self._served[i] = min(there)

    def _at_turn(self, live: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The live tasks that take part in this turn: with active_tasks, those with the fewest tokens
        served."""
        active = self.config.active_tasks
        if active is None:
            return live
        begins = len(self._steps) % (self.config.turn_steps or TURN_STEPS) == 0
        if self._turn is None or begins or not (live & self._turn).any():
            order = np.where(live, self._served, np.inf).argsort(kind="stable")
            self._turn = np.zeros_like(live)
            self._turn[order[:active]] = True
            self._wait_for_its_turn()
        return live & self._turn

    def _wait_for_its_turn(self) -> None:
        """Return a postponed draw of a task that waits for its turn to the front of its queue."""
        if self._postponed is not None and self._turn is not None and not self._turn[self._postponed[0]]:
            (index, examples), self._postponed = self._postponed, None
            stream = self.streams[index]
            self._queues[index] = chain(examples, self._queues[index])
            self._served[index] -= stream.lengths[list(examples)].sum() / stream.weight

    def _choose(self, live: NDArray[np.bool_]) -> tuple[int, tuple[int, ...]] | None:
        """The next of the `live` tasks and its next examples, None if no task is live."""
        if not live.any():
            return None
        if self.config.strategy == "fair":
            # Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
            # serve the
            # task with the fewest tokens per weight. Two live tasks never drift apart by more than one draw.
            index = int(np.where(live, self._served, np.inf).argmin())
        else:
            shares = np.where(live, self._weights(live), 0.0)
            index = int(self._random.choice(len(shares), p=shares / shares.sum()))
        examples = tuple(next(self._queues[index]) for _ in range(self.config.examples_per_draw))
        stream = self.streams[index]
        self._served[index] += stream.lengths[list(examples)].sum() / stream.weight
        return index, examples

    def _learners(self, stream: Stream) -> tuple[str, ...]:
        if not stream.begins <= len(self._steps) < stream.ends:
            return ()
        return self._still_learning(stream)

    def _still_learning(self, stream: Stream) -> tuple[str, ...]:
        taken = self._steps_taken[stream.name]
        now = len(self._steps)
        return tuple(
            adapter
            for adapter, limit in stream.max_steps.items()
            if taken < limit and now < self.left.get(adapter, now + 1)
        )

    def _weights(self, live: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Unnormalized shares of the strategy. live: the tasks that are drawn from now on. Default: all."""
        weights = np.array([stream.weight for stream in self.streams])
        sizes = np.array([len(stream.lengths) for stream in self.streams], dtype=np.float64)
        if self.config.strategy == "proportional":
            return weights * sizes
        if self.config.strategy == "temperature":
            sized = weights * sizes
            largest = sized.max() if live is None else sized[live].max()
            return np.minimum(sized / largest, 1.0) ** (
                1.0 / (self.config.temperature or 1.0)
            )  # powers of more than 1 overflow
        return weights

    def _check_budget(self) -> None:
        for stream in self.streams:
            examples = self.config.examples_per_draw
            problem = draw_problem(
                stream.name,
                stream.lengths,
                len(stream.max_steps),
                examples,
                self.tokens_per_step,
                shared=stream.shared,
            )
            if problem is not None:
                raise UserError(problem)


def _endless_examples(stream: Stream, seed: int) -> Iterator[int]:
    """The task's examples, every epoch in a new order."""
    epoch = 0
    while True:
        random = np.random.default_rng(seed_of(seed, stream.name, f"epoch {epoch}"))
        yield from map(int, random.permutation(len(stream.lengths)))
        epoch += 1


def draw_problem(
    task: str,
    lengths: NDArray[np.int64],
    adapters: int,
    examples: int,
    tokens_per_step: int,
    *,
    shared: NDArray[np.int64] | None = None,
) -> Problem | None:
    """The problem if one draw of a task for all its adapters does not fit into a step, or None.

    lengths: int [n], tokens of its examples; examples: number of examples per draw; shared: see Stream.
    """
    longest = int(lengths.max())
    needed = longest * adapters * examples
    more = ""
    if shared is not None and int(shared.max()):
        needed = int((lengths * adapters + shared).max()) * examples
        more = f" and up to {int(shared.max())} tokens of its reference"
    if needed <= tokens_per_step:
        return None
    hint = (
        f"cannot hold one draw of task {task!r}: {examples} example(s) of up to {longest} tokens for each of "
        f"{adapters} adapters{more}; raise it to {needed}, or shorten training.max_length"
    )
    return Problem("training.tokens_per_step", tokens_per_step, hint)
