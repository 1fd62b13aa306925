"""Which examples a step trains on: a pure function, within budget, in the promised shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flora_train.config.errors import UserError
from flora_train.config.training_schema import MixtureConfig
from flora_train.data.mixture import Stream, TaskMixture

FOR_EVER = 10**9


def stream(name: str, lengths: Any, weight: float = 1.0, **max_steps: int) -> Stream:
    return Stream(name, np.asarray(lengths, dtype=np.int64), weight, max_steps or {f"{name}-lora": FOR_EVER})


def mixture(
    streams: list[Stream], strategy: str = "uniform", budget: int = 1000, seed: int = 0, **options: Any
) -> TaskMixture:
    return TaskMixture(streams, MixtureConfig(strategy=strategy, **options), budget, seed)


def three() -> list[Stream]:
    generator = np.random.default_rng(0)
    return [
        stream(
            name, generator.integers(5, 60, n), weight, **{f"{name}-{i}": FOR_EVER for i in range(adapters)}
        )
        for name, n, weight, adapters in (("a", 40, 1.0, 3), ("b", 7, 2.0, 1), ("c", 200, 0.5, 2))
    ]


STRATEGIES = [("uniform", {}), ("proportional", {}), ("temperature", {"temperature": 3.0}), ("fair", {})]
each_strategy = pytest.mark.parametrize(
    ("strategy", "options"), STRATEGIES, ids=lambda value: value if isinstance(value, str) else ""
)


@each_strategy
def test_step_is_a_pure_function_of_seed_and_number(strategy: str, options: dict[str, float]) -> None:
    forwards, backwards = mixture(three(), strategy, **options), mixture(three(), strategy, **options)
    steps = {number: forwards.step(number) for number in range(30)}
    assert {number: backwards.step(number) for number in reversed(range(30))} == steps
    other = mixture(three(), strategy, seed=1, **options)
    assert any(other.step(number) != draws for number, draws in steps.items())


@each_strategy
@pytest.mark.parametrize("examples_per_draw", [1, 3])
def test_budget_is_kept_and_filled_up_to_one_draw(
    strategy: str, options: dict[str, float], examples_per_draw: int
) -> None:
    mix = mixture(three(), strategy, examples_per_draw=examples_per_draw, **options)
    largest = max(mix.tokens_of(draw) for number in range(200) for draw in mix.step(number))
    for number in range(200):
        tokens = sum(mix.tokens_of(draw) for draw in mix.step(number))
        assert 1000 - largest < tokens <= 1000
        assert all(len(draw.examples) == examples_per_draw for draw in mix.step(number))


@each_strategy
def test_every_example_comes_once_an_epoch_and_the_next_epoch_in_another_order(
    strategy: str, options: dict[str, float]
) -> None:
    mix = mixture(three(), strategy, **options)
    seen: dict[str, list[int]] = defaultdict(list)
    for number in range(300):
        for draw in mix.step(number):
            seen[draw.task] += draw.examples
    for s in three():
        n = len(s.lengths)
        epochs = [seen[s.name][i : i + n] for i in range(0, len(seen[s.name]) - n + 1, n)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_every_adapter_of_a_task_learns_from_the_same_examples() -> None:
    mix = mixture(three())
    draws = [draw for number in range(50) for draw in mix.step(number)]
    assert {(draw.task, draw.adapters) for draw in draws} == {(s.name, tuple(s.max_steps)) for s in three()}


def test_order_of_a_tasks_examples_does_not_depend_on_other_tasks() -> None:
    def first(streams: list[Stream]) -> list[int]:
        mix = mixture(streams)
        return [
            e for number in range(200) for draw in mix.step(number) if draw.task == "a" for e in draw.examples
        ][:80]

    assert first(three()) == first(three()[:1])


@pytest.mark.parametrize(
    ("strategy", "options", "expected"),
    [
        ("uniform", {}, {"a": 1.0, "b": 2.0, "c": 0.5}),
        ("proportional", {}, {"a": 40.0, "b": 14.0, "c": 100.0}),
        ("temperature", {"temperature": 1.0}, {"a": 40.0, "b": 14.0, "c": 100.0}),
        ("temperature", {"temperature": 2.0}, {"a": 40**0.5, "b": 14**0.5, "c": 100**0.5}),
        ("temperature", {"temperature": 1e6}, {"a": 1.0, "b": 1.0, "c": 1.0}),
    ],
)
def test_shares_of_examples_follow_the_strategy(
    strategy: str, options: dict[str, float], expected: dict[str, float]
) -> None:
    mix = mixture(three(), strategy, **options)
    draws = Counter(draw.task for number in range(600) for draw in mix.step(number))
    total, weight = draws.total(), sum(expected.values())
    assert total > 5000
    for task, w in expected.items():
        share = w / weight
        assert mix.target_shares()[task] == pytest.approx(share, rel=1e-4)
        assert (
            abs(draws[task] / total - share) < 4 * (share * (1 - share) / total) ** 0.5
        )  # four standard errors


@each_strategy
def test_expected_token_shares_are_those_that_are_drawn(strategy: str, options: dict[str, float]) -> None:
    mix = mixture(three(), strategy, **options)
    lengths = {s.name: s.lengths for s in mix.streams}
    tokens: Counter[str] = Counter()
    for number in range(600):
        for draw in mix.step(number):
            tokens[draw.task] += int(lengths[draw.task][list(draw.examples)].sum())
    for task, share in mix.token_shares().items():
        assert tokens[task] / tokens.total() == pytest.approx(share, abs=0.02)


def test_token_shares_count_only_the_steps_of_each_task() -> None:
    early, late = stream("early", [10] * 200), replace(stream("late", [10] * 200, 3.0), begins=10, ends=30)
    mix = mixture([replace(early, ends=20), late])
    tokens = Counter(draw.task for number in range(30) for draw in mix.step(number))
    assert mix.token_shares() == pytest.approx({"early": (10 + 10 / 4) / 30, "late": (10 * 3 / 4 + 10) / 30})
    assert tokens["early"] / tokens.total() == pytest.approx((10 + 10 / 4) / 30, abs=0.03)


def skewed() -> list[Stream]:
    """Lengths 10 to 500, sizes 20 to 5000, weights 1 to 3, one to three adapters."""
    return [
        stream("short", [10] * 5000),
        stream("long", [500] * 20),
        stream("mixed", np.random.default_rng(0).integers(10, 500, 300), 3.0),
        stream("many", [40] * 200, 1.5, x=FOR_EVER, y=FOR_EVER, z=FOR_EVER),
    ]


def served_tokens(mix: TaskMixture, steps: int) -> list[dict[str, int]]:
    """Tokens of each task up to and with every single draw, whatever the number of adapters."""
    total = dict.fromkeys((s.name for s in mix.streams), 0)
    lengths = {s.name: s.lengths for s in mix.streams}
    history = []
    for number in range(steps):
        for draw in mix.step(number):
            total[draw.task] += int(lengths[draw.task][list(draw.examples)].sum())
            history.append(dict(total))
    return history


def test_fair_keeps_every_task_within_one_draw_of_its_token_share_at_every_draw() -> None:
    mix = mixture(skewed(), "fair", budget=3000)
    shares, weights = mix.target_shares(), {s.name: s.weight for s in mix.streams}
    assert shares == pytest.approx({"short": 1 / 6.5, "long": 1 / 6.5, "mixed": 3 / 6.5, "many": 1.5 / 6.5})
    history = served_tokens(mix, 300)
    assert len(history) > 5000
    for served in history:
        virtual = [served[task] / weights[task] for task in served]
        assert max(virtual) - min(virtual) <= 500  # one draw of the longest example at weight 1
        total = sum(served.values())
        assert all(abs(served[task] - shares[task] * total) <= 500 * weights[task] for task in served)
    final = history[-1]
    assert {task: round(n / sum(final.values()), 3) for task, n in final.items()} == {
        "short": 0.154,
        "long": 0.154,
        "mixed": 0.461,
        "many": 0.231,
    }


def test_fair_serves_equal_tokens_where_uniform_starves_short_tasks_fifty_to_one() -> None:
    streams = [stream("short", [10] * 5000), stream("long", [500] * 20)]
    shares = {}
    for strategy in ("uniform", "proportional", "fair"):
        served = served_tokens(mixture(streams, strategy, budget=3000), 150)[-1]
        shares[strategy] = served["short"] / sum(served.values())
    assert shares["fair"] == pytest.approx(0.5, abs=0.001)
    assert shares["uniform"] == pytest.approx(10 / 510, rel=0.15)
    assert shares["proportional"] == pytest.approx(5000 * 10 / (5000 * 10 + 20 * 500), rel=0.05)


def test_fair_never_lets_a_task_wait_longer_than_the_others_need_to_catch_up() -> None:
    mix = mixture(skewed(), "fair", budget=3000)
    waiting = dict.fromkeys((s.name for s in mix.streams), 0)
    lengths = {s.name: s.lengths for s in mix.streams}
    longest = 0
    for number in range(300):
        for draw in mix.step(number):
            tokens = int(lengths[draw.task][list(draw.examples)].sum())
            waiting = {task: 0 if task == draw.task else n + tokens for task, n in waiting.items()}
            longest = max(longest, *waiting.values())
    # a task just served is at most 500 tokens per weight ahead; each other one gets as much, and at most one
    # draw more
    assert longest <= sum(500 * s.weight + 500 for s in mix.streams if s.name != "short")


def test_adapters_leave_after_their_own_steps_and_the_task_with_the_last() -> None:
    streams = [stream("a", [10] * 30, quick=3, slow=8), stream("b", [10] * 30, other=12)]
    mix = mixture(streams, "fair", budget=100)
    taken: Counter[str] = Counter()
    present: dict[str, list[int]] = defaultdict(list)
    for number in range(30):
        names = {name for draw in mix.step(number) for name in draw.adapters}
        taken.update(names)
        for name in names:
            present[name].append(number)
    assert taken == {"quick": 3, "slow": 8, "other": 12}
    assert present["quick"] == [0, 1, 2]
    assert max(present["slow"]) < max(present["other"])
    assert mix.step(29) == ()


@each_strategy
def test_budget_of_retired_tasks_goes_to_the_others(strategy: str, options: dict[str, float]) -> None:
    mix = mixture(
        [stream("a", [10] * 30, x=2), stream("b", [10] * 30, y=50)], strategy, budget=100, **options
    )
    late = [draw for number in range(10, 20) for draw in mix.step(number)]
    assert {draw.task for draw in late} == {"b"}
    assert len(late) == 100


def test_draw_that_cannot_fit_into_a_step_is_an_error_with_the_number_that_does() -> None:
    with pytest.raises(
        UserError, match=r"training.tokens_per_step = 100: .*task 'a'.*raise it to 120"
    ) as caught:
        mixture([stream("a", [10, 20], x=5, y=5, z=5)], budget=100, examples_per_draw=2)
    assert len(caught.value.problems) == 1
    assert mixture([stream("a", [10, 20], x=5, y=5, z=5)], budget=120, examples_per_draw=2).step(0)


@pytest.mark.parametrize("strategy", ["uniform", "fair"])
def test_retired_task_is_in_no_later_step_and_changes_no_earlier_one(strategy: str) -> None:
    config = MixtureConfig(strategy=strategy)
    whole, left = TaskMixture(three(), config, 1000, 0), {"a-1": 4, "b-0": 4}
    without = TaskMixture(three(), config, 1000, 0, left)
    assert [without.step(n) for n in range(4)] == [whole.step(n) for n in range(4)]
    after = [draw for n in range(4, 40) for draw in without.step(n)]
    assert {adapter for draw in after for adapter in draw.adapters} == {"a-0", "a-2", "c-0", "c-1"}
    assert all(
        sum(without.tokens_of(draw) for draw in without.step(n)) > 1000 - 60 * 3 for n in range(4, 40)
    ), "its part is given away"


def test_steps_are_empty_after_all_tasks_are_retired() -> None:
    streams = [stream("a", [10, 20], **{"a-0": FOR_EVER})]
    gone = TaskMixture(streams, MixtureConfig(), 100, 0, {"a-0": 2})
    assert [bool(gone.step(n)) for n in range(4)] == [True, True, False, False]


def test_tasks_take_turns_and_none_falls_behind() -> None:
    """Twelve tasks, four at a time, turns of five steps: after every third turn all have had the same, up to
    a draw."""
    lengths = np.random.default_rng(0).integers(5, 60, 50)
    mix = mixture(
        [stream(f"t{i}", lengths) for i in range(12)], "fair", budget=400, active_tasks=4, turn_steps=5
    )
    served: Counter[str] = Counter()
    for turn in range(30):
        steps = [mix.step(5 * turn + i) for i in range(5)]
        assert len({draw.task for step in steps for draw in step}) == 4
        for step in steps:
            for draw in step:
                served[draw.task] += mix.tokens_of(draw)
        if turn % 3 == 2:
            assert len(served) == 12
            assert max(served.values()) - min(served.values()) < 2 * 60 + 5 * 400 / 4


def test_draw_that_did_not_fit_in_a_turn_is_first_in_the_next() -> None:
    """Every example of a task once an epoch, in the order of one that has no turns."""
    lengths = np.random.default_rng(1).integers(5, 60, 50)
    streams = [stream(f"t{i}", lengths) for i in range(4)]
    turns = mixture(streams, "fair", budget=300, active_tasks=1, turn_steps=2)
    for name in ("t0", "t3"):
        drawn = [e for n in range(200) for draw in turns.step(n) if draw.task == name for e in draw.examples]
        alone = mixture([stream(name, lengths)], "fair", budget=300)
        expected = [e for n in range(50) for draw in alone.step(n) for e in draw.examples]
        assert len(drawn) > 150
        assert drawn[: len(expected)] == expected[: len(drawn)]


def test_a_turn_ends_early_where_all_its_tasks_have_left() -> None:
    streams = [stream(f"t{i}", [20] * 10, **{f"t{i}-lora": 3}) for i in range(6)]
    mix = mixture(streams, "fair", budget=40, active_tasks=2, turn_steps=50)
    drawn = [{draw.task for draw in mix.step(number)} for number in range(9)]
    assert [sorted(tasks) for tasks in drawn[::3]] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert mix.step(9) == ()
