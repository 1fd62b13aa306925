"""FairScheduler on the real engine: the paper's bound, weights, preemption, aborts, slots, equal texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.errors import UserError
from tests.conftest import spec
from tests.serving.tiny import Exported, export_adapters, save_base
from tests.serving.traffic import Traffic, engine

A, B, C, D, HEAVY = "a-lora", "b-lora", "c-lora", "d-lora", "heavy-lora"
ROWS = 4
LEAD = 300.0
SETTINGS = json.dumps({"weights": {HEAVY: 2}, "slot_lead": LEAD})
LONGEST, MOST = 40, 30
"""Tokens of the longest prompt and of the longest output."""
SMALL_CACHE = {"block_size": 32, "num_gpu_blocks_override": 8, "max_model_len": 128}
BOUND = 2 * max(LONGEST, 2 * ROWS * (LONGEST + MOST))


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("loras")
    specs = [spec("lora", name.removesuffix("-lora"), "lora", rank=2) for name in (A, B, C, D, HEAVY)]
    return export_adapters(save_base(folder / "base"), folder / "adapters", specs)


@pytest.fixture(scope="module", params=["fair", "fair async"])
def llm(request: pytest.FixtureRequest, loras: Exported) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_TRAIN_FAIRNESS", SETTINGS)
        with engine(loras.base, request.param, max_num_seqs=ROWS) as made:
            core = made.llm_engine.engine_core.engine_core
            assert (core.batch_queue is not None) == ("async" in request.param)
            assert (
                type(core.scheduler).__name__
                == {
                    "fair": "FairScheduler",
                    "fair async": "AsyncFairScheduler",
                }[request.param]
            )
            yield made


@pytest.fixture
def traffic(llm: Any, loras: Exported) -> Iterator[Traffic]:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    own = {name: scheduler.__dict__.get(name) for name in ("_charged", "_preempt_request")}
    callback = scheduler.waiting._on_charge
    yield Traffic(llm, loras)
    llm.llm_engine.abort_request(list(scheduler.requests), internal=True)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert not len(scheduler.fair)
    for name, value in own.items():
        if value is None:
            scheduler.__dict__.pop(name, None)
    scheduler.waiting._on_charge = callback


def difference(traffic: Traffic, one: str | None, other: str | None, weight: float = 1.0) -> float:
    """The largest difference of what two clients were given in any interval of steps."""
    leads = [given.get(one, 0) / weight - given.get(other, 0) for given in traffic.leads]
    return max([0.0, *leads]) - min([0.0, *leads])


def backlog(traffic: Traffic, *clients: str | None) -> None:
    """Run while all these clients have waiting requests."""
    while all(traffic.waiting(client) for client in clients):
        traffic.step()


def test_two_clients_with_backlogs_get_the_same_service(traffic: Traffic) -> None:
    traffic.send(A, LONGEST, 5, count=60)
    for prompt, output in ((3, MOST), (20, 9)) * 8:
        traffic.send(B, prompt, output)
    backlog(traffic, A, B)
    assert difference(traffic, A, B) <= BOUND
    assert min(traffic.given[A], traffic.given[B]) > 2 * BOUND / 4
    counters = traffic.scheduler.fair.counters()
    assert abs(counters[f"adapter:{A}"] - counters[f"adapter:{B}"]) <= BOUND / 2


def test_the_stock_scheduler_is_not_fair(loras: Exported) -> None:
    """The test above can fail: first come, first served."""
    with engine(loras.base, "stock", max_num_seqs=ROWS) as made:
        traffic = Traffic(made, loras)
        traffic.send(A, LONGEST, 5, count=60)
        traffic.send(B, 3, MOST, count=8)
        backlog(traffic, A, B)
        assert difference(traffic, A, B) > BOUND


def test_twice_the_weight_gets_twice_the_service(traffic: Traffic) -> None:
    traffic.send(HEAVY, 20, 10, count=80)
    traffic.send(B, 20, 10, count=40)
    backlog(traffic, HEAVY, B)
    assert difference(traffic, HEAVY, B, weight=2.0) <= BOUND
    assert 1.6 <= traffic.given[HEAVY] / traffic.given[B] <= 2.5


def test_charges_are_the_tokens_of_prompts_and_outputs(traffic: Traffic) -> None:
    for client, prompt, output in ((A, 7, 3), (None, 30, 12), (B, 1, 1), (A, 40, 30), (None, 12, 5)):
        traffic.send(client, prompt, output)
    traffic.run()
    charges = list(traffic.charges.values())
    assert sorted(charges) == sorted([7 + 6, 30 + 24, 1 + 2, 40 + 60, 12 + 10])


def test_a_newcomer_is_served_beside_a_flood_and_does_not_take_over(traffic: Traffic) -> None:
    traffic.send(A, 20, 10, count=60)
    traffic.run(60)
    before = dict(traffic.given)
    small = traffic.send(None, 10, 5)
    traffic.run(30)
    assert len(traffic.tokens[small[0]]) == 5
    traffic.send(B, 20, 10, count=60)
    start = len(traffic.leads)
    backlog(traffic, A, B)
    later = [given.get(A, 0) - given.get(B, 0) for given in traffic.leads[start:]]
    assert max(later) - min(later) <= BOUND
    assert traffic.given[A] > before[A]


def test_a_client_with_a_backlog_uses_the_whole_engine_when_it_is_alone(traffic: Traffic) -> None:
    traffic.send(A, 10, 8, count=16)
    traffic.run()
    # four rounds of four rows: no row is kept free for anyone
    assert len(traffic.leads) <= 4 * (8 + 2)


def test_aborted_requests_leave_nothing(traffic: Traffic) -> None:
    flood = traffic.send(A, 20, 30, count=20)
    other = traffic.send(B, 20, 10, count=4)
    traffic.run(5)
    traffic.abort(*flood)
    traffic.run()
    assert all(len(traffic.tokens[identifier]) == 10 for identifier in other)
    assert not traffic.scheduler.requests
    assert not traffic.scheduler.fair._requests
    again = traffic.send(A, 20, 3)
    traffic.run()
    assert len(traffic.tokens[again[0]]) == 3


def test_an_adapter_without_a_slot_neither_blocks_nor_starves(loras: Exported) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_TRAIN_FAIRNESS", SETTINGS)
        with engine(loras.base, "fair", max_num_seqs=ROWS, max_loras=2) as made:
            traffic = Traffic(made, loras)
            traffic.send(A, 10, 10, count=60)
            traffic.send(B, 10, 10, count=60)
            traffic.run(20)
            third = traffic.send(C, 10, 10, count=3)
            base = traffic.send(None, 10, 3)
            traffic.run(25)
            # the base needs no slot and does not wait behind the third adapter
            assert len(traffic.tokens[base[0]]) == 3
            before = traffic.given[A] + traffic.given[B]
            while not all(len(traffic.tokens[identifier]) == 10 for identifier in third):
                traffic.step()
            # both adapters had their lead, and then what ran was finished
            assert traffic.given[A] + traffic.given[B] - before <= 2 * LEAD + 2 * ROWS * (10 + 2 * 10)
            assert traffic.waiting(A)
            assert traffic.waiting(B)
            backlog(traffic, A, B)
            assert difference(traffic, A, B) <= BOUND + 2 * LEAD
            traffic.run()
            # where nothing but requests without a slot waits
            traffic.send(A, 10, 20)
            traffic.send(B, 10, 20)
            traffic.run(2)
            late = traffic.send(C, 10, 5, count=10) + traffic.send(D, 10, 5, count=10)
            traffic.run(5)
            assert not any(traffic.tokens[identifier] for identifier in late)
            assert len(traffic.scheduler.waiting) == 20
            traffic.run()
            assert all(len(traffic.tokens[identifier]) == 5 for identifier in late)


def test_two_clients_take_turns_with_one_slot(loras: Exported) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_TRAIN_FAIRNESS", SETTINGS)
        with engine(loras.base, "fair async", max_num_seqs=ROWS, max_loras=1) as made:
            traffic = Traffic(made, loras)
            traffic.send(A, 10, 10, count=40)
            traffic.send(B, 10, 10, count=40)
            backlog(traffic, A, B)
            assert difference(traffic, A, B) <= BOUND + 2 * LEAD
            assert min(traffic.given[A], traffic.given[B]) >= 30 * 20


@pytest.mark.parametrize("scheduler", ["fair", "fair async"])
def test_preempted_requests_are_charged_once(loras: Exported, scheduler: str) -> None:
    """A cache of 8 blocks, which four requests outgrow."""
    with engine(loras.base, scheduler, max_num_seqs=ROWS, **SMALL_CACHE) as made:
        traffic = Traffic(made, loras)
        traffic.send(A, 20, 60, count=6)
        traffic.send(B, 20, 60, count=6)
        traffic.run()
        assert traffic.preemptions > 3
        assert list(traffic.charges.values()) == [20 + 2 * 60] * 12
        assert all(len(tokens) == 60 for tokens in traffic.tokens.values())
        assert difference(traffic, A, B) <= 2 * max(20, 2 * 8 * 32)
        # who is furthest ahead is preempted (a step that preempts several decides once)
        first = {step: (victim, rest) for step, victim, rest in reversed(traffic.victims)}
        assert all(victim >= rest for victim, rest in first.values())


def test_texts_are_those_of_the_stock_scheduler(loras: Exported) -> None:
    """Mixed adapters and the base, prompts in chunks, and a cache that is too small for all."""
    texts = {}
    for scheduler in ("stock", "fair", "stock async", "fair async"):
        with engine(
            loras.base,
            scheduler,
            max_num_seqs=ROWS,
            max_num_batched_tokens=32,
            **SMALL_CACHE,
        ) as made:
            traffic = Traffic(made, loras)
            for number, client in enumerate((A, None, B, A, HEAVY, None, C, D, A, B)):
                traffic.send(client, 5 + 9 * number % 60, 12 + number)
            traffic.run()
            texts[scheduler] = traffic.tokens
            assert traffic.preemptions
    assert texts["fair"] == texts["stock"]
    assert texts["fair async"] == texts["stock async"] == texts["stock"]
    assert all(len(tokens) == 12 + number for number, tokens in enumerate(texts["fair"].values()))


def test_requests_that_wait_for_their_grammar_hold_nobody_up(traffic: Traffic) -> None:
    structured = traffic.send(A, 10, 6, count=3, regex="[ab]{4}")
    plain = traffic.send(B, 10, 6, count=3)
    traffic.run()
    assert all(len(traffic.tokens[identifier]) == 6 for identifier in plain)
    allowed = {traffic.llm.get_tokenizer().convert_tokens_to_ids(letter) for letter in "ab"}
    for identifier in structured:
        assert len(traffic.tokens[identifier][:4]) == 4
        assert set(traffic.tokens[identifier][:4]) <= allowed
        assert traffic.charges[traffic.internal(identifier)] == 10 + 2 * len(traffic.tokens[identifier])


def test_the_priority_policy_is_refused(loras: Exported) -> None:
    with (
        pytest.raises(UserError, match="--scheduling-policy = 'priority': FairScheduler has an order of"),
        engine(loras.base, "fair", scheduling_policy="priority"),
    ):
        pass


def test_wrong_weights_are_one_error_before_anything_starts(loras: Exported, tmp_path: Path) -> None:
    file = tmp_path / "fairness.yaml"
    file.write_text("weights: {lua: 0}\n")
    code = f"from vllm import LLM; LLM({str(loras.base)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLORA_TRAIN_FAIRNESS": str(file)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last.endswith(f"UserError: {file}: weights.lua = 0: must be greater than or equal to 0.000001")
