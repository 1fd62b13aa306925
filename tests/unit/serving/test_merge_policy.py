"""The policy of merging against always and never merging, on traces of requests with a simulated clock."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.serving.merge_policy import Adapter, MergeCosts, MergePolicy

COSTS = MergeCosts(
    merge_seconds=0.4,
    unmerge_seconds=0.1,
    saved_per_step=0.01,
    saved_per_row=0.001,
    foreign_per_step=0.01,
    foreign_per_row=0.003,
)
PLAIN_STEP, PLAIN_ROW = 0.03, 0.001
"""Seconds of an unmerged step, and of each of its rows beyond that."""
MARGIN = 0.05
"""Time that the policy may take beyond the better of always and never merging, on stationary traffic."""


@dataclass(frozen=True)
class Step:
    rows: Counter[Adapter]
    started: Counter[Adapter]


def trace(
    shares: dict[Adapter, float], steps: int, *, seed: int, load: float = 0.7, max_rows: int = 8
) -> list[Step]:
    """The steps of a batch with a queue; requests arrive at random and have 1 to 60 tokens."""
    random, queue, live, result = Random(seed), [], [], []
    adapters, weights = list(shares), list(shares.values())
    for _ in range(steps):
        if random.random() < load * max_rows / 30:
            queue.append(random.choices(adapters, weights)[0])
        started: Counter[Adapter] = Counter()
        while queue and len(live) < max_rows:
            adapter = queue.pop(0)
            started[adapter] += 1
            live.append([adapter, random.randint(1, 60)])
        if live:
            result.append(Step(Counter(adapter for adapter, _ in live), started))
        for request in live:
            request[1] -= 1
        live = [request for request in live if request[1]]
    return result


def step_seconds(costs: MergeCosts, merged: Adapter, rows: Counter[Adapter]) -> float:
    total = rows.total()
    seconds = PLAIN_STEP + PLAIN_ROW * total
    if merged is not None:
        seconds -= costs.gain(rows[merged], total - rows[merged])
    return seconds


def seconds_of(policy: MergePolicy, steps: list[Step]) -> float:
    """The clock at the end: steps and switches."""
    clock, merged = 0.0, policy.merged
    for step in steps:
        choice = policy.step(step.rows, step.started)
        costs = policy.costs_of(1)
        if choice != merged:
            clock += (merged is not None) * costs.unmerge_seconds
            clock += (choice is not None) * costs.merge_seconds
            merged = choice
        clock += step_seconds(costs, merged, step.rows)
    return clock


def fixed_seconds(costs: MergeCosts, merged: Adapter, steps: list[Step]) -> float:
    clock = 0.0 if merged is None else costs.merge_seconds
    return clock + sum(step_seconds(costs, merged, step.rows) for step in steps)


def seconds_at_best(costs: MergeCosts, steps: list[Step], adapters: list[Adapter]) -> float:
    """The best of never merging, and of merging one adapter before the first step."""
    return min(fixed_seconds(costs, merged, steps) for merged in (None, *adapters))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("load", [0.2, 0.7, 1.5])
def test_stationary_traffic_takes_hardly_more_than_the_best_fixed_choice(share: float, load: float) -> None:
    shares: dict[Adapter, float] = {1: share, 2: (1 - share) / 2, None: (1 - share) / 2}
    for seed in range(2):
        steps = trace(shares, 6000, seed=seed, load=load)
        policy = MergePolicy(lambda adapter: COSTS, max_requests=10**9)
        best = seconds_at_best(COSTS, steps, [1, 2])
        assert seconds_of(policy, steps) <= (1 + MARGIN) * best


seconds = st.floats(1e-4, 1.0)


@given(
    merge=seconds,
    unmerge=seconds,
    saved=st.floats(0, PLAIN_STEP),
    saved_per_row=st.floats(0, PLAIN_ROW),
    foreign=st.floats(0, PLAIN_STEP),
    foreign_per_row=st.floats(0, 10 * PLAIN_ROW),
    share=st.floats(0, 1),
    load=st.floats(0.05, 2),
    seed=st.integers(0, 1000),
)
def test_any_costs_and_any_stationary_traffic(
    merge: float,
    unmerge: float,
    saved: float,
    saved_per_row: float,
    foreign: float,
    foreign_per_row: float,
    share: float,
    load: float,
    seed: int,
) -> None:
    costs = MergeCosts(merge, unmerge, saved, saved_per_row, foreign, foreign_per_row)
    steps = trace({1: share, 2: 1 - share}, 3000, seed=seed, load=load)
    policy = MergePolicy(lambda adapter: costs, max_requests=10**9)
    taken = seconds_of(policy, steps)
    # What is learnt at the beginning costs a few switches, however short the trace.
    assert taken <= (1 + MARGIN) * seconds_at_best(costs, steps, [1, 2]) + 6 * costs.round_trip
    assert policy.switches * costs.round_trip <= total_differences(costs, steps)


def total_differences(costs: MergeCosts, steps: list[Step]) -> float:
    """The seconds that the choices differ by in all steps together."""
    total = 0.0
    for step in steps:
        rows = step.rows.total()
        gains = [0.0] + [costs.gain(step.rows[adapter], rows - step.rows[adapter]) for adapter in (1, 2)]
        total += max(gains) - min(gains)
    return total


def test_an_adapter_that_dominates_is_merged_and_unmerged_when_the_mix_changes() -> None:
    policy = MergePolicy(lambda adapter: COSTS, max_requests=1000)
    dominated, mixed = Counter({1: 8}), Counter({1: 2, 2: 3, 3: 2, None: 1})
    states = [policy.step(dominated) for _ in range(40)]
    gain = COSTS.gain(8, 0)
    assert states.index(1) == int(COSTS.round_trip / gain)
    assert states[-1] == 1
    states = [policy.step(mixed) for _ in range(40)]
    assert states.index(None) == int(COSTS.round_trip / -COSTS.gain(2, 6))
    assert states[-1] is None
    states = [policy.step(Counter({2: 8})) for _ in range(100)]
    assert states[-1] == 2
    # From one adapter directly to another.
    states = [policy.step(Counter({3: 8})) for _ in range(400)]
    assert states[-1] == 3
    assert policy.switches == 4 + (None in states)


def test_equal_shares_are_never_merged() -> None:
    policy = MergePolicy(lambda adapter: COSTS, max_requests=1000)
    for _ in range(1000):
        assert policy.step(Counter({1: 2, 2: 2, 3: 2, None: 2})) is None


def test_a_mix_that_keeps_changing_ends_in_few_switches() -> None:
    """Each change lasts as long as a switch of an impatient policy takes, so that it never pays."""
    policy = MergePolicy(lambda adapter: COSTS, max_requests=10**9)
    own, mixed = Counter({1: 8}), Counter({1: 2, 2: 6})
    steps_own = int(COSTS.round_trip / COSTS.gain(8, 0)) + 1
    steps_mixed = int(COSTS.round_trip / -COSTS.gain(2, 6)) + 1
    cycle = [Step(own, Counter())] * steps_own + [Step(mixed, Counter())] * steps_mixed
    steps = cycle * 150
    taken = seconds_of(policy, steps)
    assert policy.switches <= 12
    assert taken <= 1.02 * seconds_at_best(COSTS, steps, [1, 2])


@given(max_requests=st.integers(0, 20), seed=st.integers(0, 1000))
def test_a_merged_adapter_is_at_a_loss_for_a_bounded_number_of_its_requests(
    max_requests: int, seed: int
) -> None:
    random = Random(seed)
    policy = MergePolicy(lambda adapter: COSTS, max_requests=max_requests)
    for _ in range(100):
        policy.step(Counter({1: 8}))
    assert policy.merged == 1
    policy.patience = 10**6
    overtaken = 0
    for _ in range(1000):
        started = Counter({1: random.randint(0, 2), 2: random.randint(0, 2)})
        state = policy.step(Counter({1: 2, 2: 6}), started)
        if state is None:
            break
        overtaken += started[1]
        assert overtaken <= max_requests
    assert policy.merged is None


def test_no_row_is_excluded() -> None:
    """The policy only chooses a state; it has no way to delay a request."""
    policy = MergePolicy(lambda adapter: COSTS, max_requests=5)
    for step in trace({1: 0.9, 2: 0.1}, 2000, seed=0):
        assert policy.step(step.rows, step.started) in (None, 1, 2)


def test_costs_are_those_of_each_adapter_and_may_change() -> None:
    costs = {1: COSTS, 2: MergeCosts(1e9, 1e9, 0.01, 0.001, 0.01, 0.003)}
    policy = MergePolicy(lambda adapter: costs[adapter], max_requests=5)
    for _ in range(1000):
        assert policy.step(Counter({2: 8})) is None
    costs[2] = COSTS
    assert policy.step(Counter({2: 8})) == 2


def test_an_adapter_that_is_unloaded_is_forgotten() -> None:
    policy = MergePolicy(lambda adapter: COSTS, max_requests=5)
    for _ in range(100):
        policy.step(Counter({1: 8}))
    policy.forget()
    assert policy.merged is None
    assert policy.step(Counter({1: 8})) is None


def test_an_empty_step_changes_nothing() -> None:
    policy = MergePolicy(lambda adapter: COSTS, max_requests=5)
    for _ in range(100):
        policy.step(Counter({1: 8}))
    assert policy.step(Counter()) == 1
