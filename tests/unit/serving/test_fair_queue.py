"""The queue in the order of virtual token counters beside a direct simulation, and the paper's bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_train.serving.fair_queue import FairQueue, Prices

PRICES = Prices()


@dataclass(eq=False)
class Request:
    client: str
    prompt: int
    output: int
    generated: int = 0


class DirectCounters:
    """The algorithm as the paper has it, with lists and without forgetting anyone."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.counters: dict[str, float] = {}
        self.queue: list[Request] = []
        self.joined: dict[str, int] = {}
        self.arrivals = 0
        self.left_last: str | None = None

    def queued(self) -> set[str]:
        return {request.client for request in self.queue}

    def add(self, request: Request, first: bool = False) -> None:
        client = request.client
        own = self.counters.setdefault(client, 0.0)
        if client not in self.queued():
            self.arrivals += 1
            self.joined[client] = self.arrivals
            if self.queue:
                own = max(own, min(self.counters[other] for other in self.queued()))
            elif self.left_last is not None:
                own = max(own, self.counters[self.left_last])
            self.counters[client] = own
        if first:
            self.queue.insert(0, request)
        else:
            self.queue.append(request)

    def head(self) -> Request:
        client = min(self.queued(), key=lambda name: (self.counters[name], self.joined[name]))
        return next(request for request in self.queue if request.client == client)

    def remove(self, request: Request) -> None:
        self.queue.remove(request)
        if request.client not in self.queued():
            self.left_last = request.client

    def charge(self, client: str, price: float) -> None:
        self.counters[client] += price / self.weights.get(client, 1.0)


@dataclass
class Engine:
    """Runs requests as a server does: admitted while their tokens fit, one token each in every step."""

    queue: FairQueue[Request]
    capacity: int
    running: list[Request] = field(default_factory=list)
    service: Counter[str] = field(default_factory=Counter)
    backlog: Counter[str] = field(default_factory=Counter)
    idle_while_queued: int = 0

    def submit(self, request: Request) -> None:
        self.backlog[request.client] += 1
        self.queue.add(request, request.client)

    def occupied(self) -> int:
        return sum(request.prompt + request.output for request in self.running)

    def step(self) -> None:
        while len(self.queue):
            request = self.queue.head()
            if self.occupied() + request.prompt + request.output > self.capacity:
                break
            assert self.queue.take() is request
            self.queue.admit(request, request.prompt)
            self.backlog[request.client] -= 1
            self.service[request.client] += PRICES.prompt * request.prompt
            self.running.append(request)
        self.idle_while_queued += bool(len(self.queue)) and not self.running
        for request in list(self.running):
            request.generated += 1
            self.queue.charge_output(request, 1)
            self.service[request.client] += PRICES.output
            if request.generated == request.output:
                self.running.remove(request)
                self.queue.finish(request)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 30))
CAPACITY = 200


def bound(requests: list[tuple[int, int]]) -> float:
    """What two clients with requests in the queue differ by at most."""
    return 2 * max(PRICES.prompt * max(prompt for prompt, _ in requests), PRICES.output * CAPACITY)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_two_backlogged_clients_get_the_same_service(data: st.DataObject) -> None:
    sizes = {name: data.draw(st.lists(SIZES, min_size=1, max_size=6)) for name in ("a", "b")}
    engine = Engine(FairQueue(prices=PRICES), CAPACITY)
    sent = Counter[str]()
    limit = bound(sizes["a"] + sizes["b"])
    leads = []
    for _ in range(200):
        # more than one step can admit, so that neither queue is ever empty
        for name in ("a", "b"):
            while engine.backlog[name] < CAPACITY:
                prompt, output = sizes[name][sent[name] % len(sizes[name])]
                engine.submit(Request(name, prompt, output))
                sent[name] += 1
        engine.step()
        leads.append(engine.service["a"] - engine.service["b"])
    # in every interval
    assert max(leads) - min(leads) <= limit
    assert engine.idle_while_queued == 0


@given(st.lists(SIZES, min_size=1, max_size=5), st.sampled_from([0.5, 2.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_service_is_proportional_to_weights(sizes: list[tuple[int, int]], weight: float) -> None:
    engine = Engine(FairQueue(lambda name: {"a": weight}.get(str(name), 1.0), PRICES), CAPACITY)
    for step in range(300):
        for name in ("a", "b"):
            while engine.backlog[name] < CAPACITY:
                engine.submit(Request(name, *sizes[step % len(sizes)]))
        engine.step()
    difference = abs(engine.service["a"] / weight - engine.service["b"])
    assert difference <= bound(sizes) / min(weight, 1.0)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("abcd"), st.integers(0, 9), st.integers(1, 9)),
        st.tuples(st.sampled_from(["admit", "skip", "step", "preempt", "abort", "abort running"])),
    ),
    max_size=120,
)


@given(EVENTS)
@settings(max_examples=300, deadline=None)
def test_order_and_counters_are_those_of_a_direct_simulation(events: list[tuple]) -> None:
    weights = {"b": 2.0, "c": 0.5}
    queue: FairQueue[Request] = FairQueue(lambda name: weights.get(str(name), 1.0))
    direct = DirectCounters(weights)
    running: list[Request] = []
    charged: set[Request] = set()
    for name, *arguments in events:
        if name == "add":
            request = Request(*arguments)
            queue.add(request, request.client)
            direct.add(request)
        elif name == "step":
            for request in running:
                queue.charge_output(request, 1)
                direct.charge(request.client, PRICES.output)
        elif name == "admit" and len(queue):
            request = queue.take()
            assert request is direct.head()
            queue.admit(request, request.prompt)
            if request not in charged:
                direct.charge(request.client, PRICES.prompt * request.prompt)
            charged.add(request)
            direct.remove(request)
            running.append(request)
        elif name == "skip" and len(queue):
            skipped = [queue.take() for _ in range(min(2, len(queue)))]
            queue.put_back(skipped)
        elif name == "preempt" and running:
            request = running.pop()
            queue.add_first(request, request.client)
            direct.add(request, first=True)
        elif name == "abort" and len(queue):
            request = list(queue)[-1]
            queue.finish(request)
            direct.remove(request)
        elif name == "abort running" and running:
            queue.finish(running.pop())
        assert len(queue) == len(direct.queue)
        if direct.queue:
            assert queue.head() is direct.head()
        for client, counter in queue.counters().items():
            assert counter == pytest.approx(direct.counters[str(client)])


def run_until(engine: Engine, done: int) -> int:
    steps = 0
    while engine.service.total() < done:
        engine.step()
        steps += 1
    return steps


@pytest.mark.parametrize("empty", [False, True], ids=["busy queue", "empty queue"])
def test_a_newcomer_neither_takes_over_nor_starves(empty: bool) -> None:
    engine = Engine(FairQueue(), 100)
    for _ in range(4 if empty else 200):
        engine.submit(Request("old", 10, 15))
    while len(engine.queue) if empty else engine.service["old"] < 2_000:
        engine.step()
    for _ in range(100):
        engine.submit(Request("new", 10, 15))
        if empty:
            engine.submit(Request("old", 10, 15))
    before = Counter(engine.service)
    run_until(engine, int(before.total()) + 3_000)
    given = {name: engine.service[name] - before[name] for name in ("old", "new")}
    assert abs(given["old"] - given["new"]) <= 2 * max(10, 2 * 100)


def test_a_client_that_returns_has_no_credit_for_the_time_it_was_away() -> None:
    engine = Engine(FairQueue(), 100)
    engine.submit(Request("away", 10, 5))
    for _ in range(300):
        engine.submit(Request("busy", 10, 15))
    run_until(engine, 4_000)
    for _ in range(300):
        engine.submit(Request("away", 10, 15))
    before = Counter(engine.service)
    run_until(engine, int(before.total()) + 3_000)
    given = {name: engine.service[name] - before[name] for name in ("busy", "away")}
    assert abs(given["busy"] - given["away"]) <= 2 * max(10, 2 * 100)


def test_an_interrupted_request_is_charged_once() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("r", "a")
    queue.take()
    queue.admit("r", 10)
    queue.charge_output("r", 3)
    assert queue.counter("a") == 16
    queue.add_first("r", "a")
    queue.take()
    queue.admit("r", 10)
    queue.charge_output("r", 1)
    assert queue.counter("a") == 18


def test_a_turn_that_continues_a_session_is_charged_for_its_new_tokens() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("r", "a")
    queue.take()
    queue.admit("r", 10)
    queue.charge_output("r", 5)
    queue.charge_prompt("r", 10 + 5 + 7)
    assert queue.counter("a") == 10 + 2 * 5 + 7


@pytest.mark.parametrize(("price", "counter"), [(None, 10), (0.0, 4), (0.1, 4.6)])
def test_price_of_cached_tokens(price: float | None, counter: float) -> None:
    queue: FairQueue[str] = FairQueue(prices=Prices(cached=price))
    queue.add("r", "a")
    queue.take()
    queue.admit("r", 10, cached=6)
    assert queue.counter("a") == pytest.approx(counter)


def test_requests_set_aside_keep_their_order_and_their_client_in_the_queue() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.add(item, item[0])
    queue.add("c1", "c")
    queue.take()
    queue.admit("a1", 50)
    taken = [queue.take(), queue.take()]
    assert taken == ["b1", "c1"]
    assert queue.head() == "a2"
    # b and c are still queued, at 0: who comes now is not lifted to the 50 of a
    queue.add("d1", "d")
    assert queue.counter("d") == 0
    queue.put_back(taken)
    assert list(queue) == ["b1", "c1", "d1", "a2"]


def test_an_abort_charges_nothing_and_leaves_no_trace() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a1", "a")
    queue.add("b1", "b")
    queue.finish("a1")
    queue.finish("a1")
    assert list(queue) == ["b1"]
    assert "a1" not in queue
    assert queue.counters() == {"b": 0}


def serve_one(queue: FairQueue[str], item: str, client: str, prompt: int) -> None:
    queue.add(item, client)
    while True:
        taken = queue.take()
        queue.admit(taken, prompt)
        queue.finish(taken)
        if taken == item:
            return


def test_clients_that_are_not_ahead_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(5_000):
        serve_one(queue, f"r{number}", f"client {number}", 10)
    assert len(queue.counters()) <= 2


def test_a_client_that_is_ahead_is_remembered_until_the_others_reach_it() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("a1", "a")
    queue.add("b1", "b")
    queue.add("b2", "b")
    queue.add("b3", "b")
    queue.take()
    queue.admit("a1", 100)
    queue.finish("a1")
    assert queue.counter("a") == 100
    queue.take()
    queue.admit("b1", 60)
    queue.finish("b1")
    assert "a" in queue.counters()
    queue.take()
    queue.admit("b2", 60)
    queue.finish("b2")
    assert "a" not in queue.counters()
    # forgotten without a loss: it begins where the others are
    assert queue.counter("a") == 120


def test_memory_is_bounded_when_very_many_clients_are_ahead() -> None:
    queue: FairQueue[str] = FairQueue(most_idle=100)
    queue.add("blocked", "b")
    blocked = queue.take()
    for number in range(5_000):
        queue.add(f"r{number}", f"client {number}")
        taken = queue.take()
        queue.admit(taken, 10 + number % 7)
        queue.finish(taken)
    assert len(queue.counters()) <= 102
    queue.put_back([blocked])
    assert queue.head() == "blocked"


def test_an_endless_sequence_of_newcomers_does_not_starve_a_client() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add("old", "old")
    for number in range(3):
        queue.add(f"r{number}", f"client {number}")
    assert queue.head() == "old"


def test_an_empty_queue_has_no_head() -> None:
    queue: FairQueue[str] = FairQueue()
    with pytest.raises(IndexError):
        queue.head()
    with pytest.raises(IndexError):
        queue.take()
    assert not list(queue)


def test_only_candidates_are_next_until_all_are_again() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1", "c1", "c2"):
        queue.add(item, item[0])
    queue.take()
    queue.narrow(lambda client: client != "a")
    assert len(queue) == 3
    assert [queue.take(), queue.take()] == ["b1", "c1"]
    queue.narrow(lambda client: client != "c")
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.head()
    # who is no candidate is queued all the same
    assert queue.floor() == 0
    queue.widen()
    queue.put_back(["a1", "b1", "c1"])
    assert list(queue) == ["a1", "a2", "b1", "c1", "c2"]
    assert len(queue) == 5
