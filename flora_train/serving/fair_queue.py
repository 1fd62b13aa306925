"""FairQueue: requests in the order of their clients' virtual token counters (VTC, arXiv 2401.00588).

Each client has a counter: the price of the tokens it was given, divided by its weight. The next request is
the oldest one of the queued client with the least counter. Two clients that always have requests in the queue
get the same weighted service, but for at most 2 max(prompt price * longest prompt, output price * tokens that
run at once).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

MOST_IDLE = 65_536
"""Largest number of clients without requests that are remembered because they are ahead of the others."""


@dataclass(frozen=True)
class Prices:
    """What a token costs its client."""

    prompt: float = 1.0
    output: float = 2.0
    cached: float | None = None
    """Of a prompt token whose keys and values the prefix cache has; None: the price of any prompt token. Such
    a token costs no computation, but it occupies memory as any other."""

    def of_prompt(self, tokens: int, cached: int) -> float:
        """The price of a prompt of which some tokens are cached."""
        if self.cached is None:
            return self.prompt * tokens
        return self.prompt * (tokens - cached) + self.cached * cached


@dataclass(eq=False)
class _Client(Generic[Item]):
    """A client with requests, or one that is ahead of the others."""

    name: Hashable
    weight: float
    counter: float = 0.0
    waiting: OrderedDict[Item, None] = field(default_factory=OrderedDict)
    """In order. An ordered dictionary, because requests leave it at any place when they are aborted."""
    set_aside: int = 0
    """Requests that were taken, and neither admitted nor put back yet."""
    requests: int = 0
    """Requests that are not finished, waiting or running."""
    joined: int = 0
    """The number of arrivals in the queue before its last one: breaks ties, so that none waits for ever."""
    in_heap: bool = False
    in_idle_heap: bool = False

    @property
    def queued(self) -> bool:
        return bool(self.waiting) or self.set_aside > 0


@dataclass(eq=False)
class _Request(Generic[Item]):
    """What a request was charged for."""

    client: _Client[Item]
    charged: int = 0
    """Tokens, of the prompt and of the output."""


class FairQueue(Generic[Item]):
    """A queue of requests with the accounts of their clients.

    A request is added, taken and admitted, charged for its output while it runs, and finished. What cannot be
    admitted after it was taken is put back. A request that was interrupted is added again, at the front, and
    is not charged again for what it was charged for.

    Args:
        weight_of: the weight of a client, more than 0; with twice the weight it is given twice the service.
        prices: what tokens cost.
        most_idle: largest number of clients without requests that are remembered. Beyond it, those that are
            ahead by the least are forgotten, and return with no lead.
    """

    def __init__(
        self,
        weight_of: Callable[[Hashable], float] = lambda client: 1.0,
        prices: Prices | None = None,
        *,
        most_idle: int = MOST_IDLE,
    ) -> None:
        self.prices = prices or Prices()
        self._weight_of = weight_of
        self._most_idle = most_idle
        self._clients: dict[Hashable, _Client[Item]] = {}
        self._requests: dict[Item, _Request[Item]] = {}
        self._heap: list[tuple[float, int, _Client[Item]]] = []
        self._idle_heap: list[tuple[float, int, _Client[Item]]] = []
        self._aside: dict[_Client[Item], None] = {}
        self._candidates: dict[_Client[Item], None] | None = None
        self._left_last: _Client[Item] | None = None
        self._arrivals = count(1)
        self._waiting = 0
        self._idle = 0

    def __len__(self) -> int:
        """Number of waiting requests of candidates, without those that are set aside."""
        if self._candidates is not None:
            return sum(len(client.waiting) for client in self._candidates)
        return self._waiting

    def __iter__(self) -> Iterator[Item]:
        """The waiting requests, by the counters of their clients as they are now."""
        waiting = [client for client in self._clients.values() if client.waiting]
        waiting.sort(key=lambda client: (client.counter, client.joined))
        for client in waiting:
            yield from tuple(client.waiting)

    def add(self, item: Item, client: Hashable) -> None:
        """Add a request behind the others of its client."""
        self._arrive(item, client).waiting[item] = None
        self._added(item)

    def add_first(self, item: Item, client: Hashable) -> None:
        """Add a request before the others of its client: one that ran and was interrupted."""
        waiting = self._arrive(item, client).waiting
        waiting[item] = None
        waiting.move_to_end(item, last=False)
        self._added(item)

    def head(self) -> Item:
        """The request that is next. Raises IndexError if none waits."""
        return next(iter(self._first().waiting))

    def take(self) -> Item:
        """Remove the request that is next and set it aside: it is to be admitted, put back or removed.

        Raises IndexError if none waits.
        """
        client = self._first()
        item, _ = client.waiting.popitem(last=False)
        self._waiting -= 1
        client.set_aside += 1
        self._aside[client] = None
        return item

    def admit(self, item: Item, prompt_tokens: int, *, cached: int = 0) -> float:
        """Charge a request that was taken, and runs now, for its prompt; returns the charge.

        Args:
            prompt_tokens: length of the prompt. What the request was charged for is not charged again.
            cached: number of those tokens that the prefix cache has.
        """
        client = self._requests[item].client
        self._no_longer_aside(client)
        charge = self.charge_prompt(item, prompt_tokens, cached=cached)
        self._leave_if_empty(client)
        return charge

    def put_back(self, items: Iterable[Item]) -> None:
        """Put requests that were taken back before the others of their clients, in the given order."""
        for item in reversed(list(items)):
            client = self._requests[item].client
            self._no_longer_aside(client)
            client.waiting[item] = None
            client.waiting.move_to_end(item, last=False)
            self._waiting += 1
            self._push(client)

    def remove(self, item: Item) -> bool:
        """Remove a request that waits; returns whether it did."""
        request = self._requests.get(item)
        if request is None or item not in request.client.waiting:
            return False
        del request.client.waiting[item]
        self._waiting -= 1
        self._leave_if_empty(request.client)
        return True

    def narrow(self, may_run: Callable[[Hashable], bool]) -> None:
        """Let only some clients be next, until `widen`: where none of the others' requests could run now, so
        that they need not be taken one by one."""
        clients = self._clients.values() if self._candidates is None else self._candidates
        self._candidates = {client: None for client in clients if client.waiting and may_run(client.name)}

    def widen(self) -> None:
        """Let all clients be next again."""
        self._candidates = None

    def release(self, item: Item) -> None:
        """Forget that a request was taken: it is neither admitted nor put back."""
        client = self._requests[item].client
        self._no_longer_aside(client)
        self._leave_if_empty(client)

    def charge_prompt(self, item: Item, prompt_tokens: int, *, cached: int = 0) -> float:
        """Charge a request for the tokens of its prompt that it was not charged for; returns the charge."""
        request = self._requests[item]
        tokens = max(prompt_tokens - request.charged, 0)
        request.charged += tokens
        return self._charge(request.client, self.prices.of_prompt(tokens, min(cached, tokens)))

    def charge_output(self, item: Item, tokens: int) -> float:
        """Charge a request for new tokens of its output; returns the charge."""
        request = self._requests[item]
        request.charged += tokens
        return self._charge(request.client, self.prices.output * tokens)

    def register(self, item: Item, client: Hashable) -> None:
        """Open the account of a request that waits in another queue."""
        if item not in self._requests:
            self._requests[item] = _Request(self._known(client))
            self._requests[item].client.requests += 1

    def finish(self, item: Item) -> None:
        """Close the account of a request that ended, wherever it was."""
        request = self._requests.get(item)
        if request is None:
            return
        self.remove(item)
        del self._requests[item]
        client = request.client
        client.requests -= 1
        if client.requests == 0:
            self._idle += 1
            self._push_idle(client)
        self._forget_idle()

    def __contains__(self, item: object) -> bool:
        """Whether a request has an account here."""
        return item in self._requests

    def client_of(self, item: Item) -> Hashable:
        """The client of a request."""
        return self._requests[item].client.name

    def counter(self, client: Hashable) -> float:
        """The counter of a client; of one that is not remembered, what it would begin with."""
        if client in self._clients:
            return self._clients[client].counter
        return self.floor()

    def weight(self, client: Hashable) -> float:
        """The weight of a client."""
        return self._weight_of(client)

    def counters(self) -> dict[Hashable, float]:
        """The counters of all clients that are remembered."""
        return {name: client.counter for name, client in self._clients.items()}

    def floor(self) -> float:
        """What a client that comes now is lifted to: the least counter of the queue, or that of the client
        that left it last. It never falls."""
        counters = [client.counter for client in self._aside]
        if self._waiting:
            counters.append(self._least().counter)
        if counters:
            return min(counters)
        if self._left_last is not None:
            return self._left_last.counter
        return 0.0

    def _known(self, name: Hashable) -> _Client[Item]:
        client = self._clients.get(name)
        if client is None:
            # the floor never falls: a forgotten client is lifted at least to what it had
            client = self._clients[name] = _Client(name, self._weight_of(name), self.floor())
        elif client.requests == 0:
            self._idle -= 1
        return client

    def _arrive(self, item: Item, name: Hashable) -> _Client[Item]:
        self.register(item, name)
        client = self._requests[item].client
        if not client.queued:
            client.counter = max(client.counter, self.floor())
            client.joined = next(self._arrivals)
        return client

    def _added(self, item: Item) -> None:
        self._waiting += 1
        self._push(self._requests[item].client)
        self._forget_idle()

    def _first(self) -> _Client[Item]:
        """The client whose request is next."""
        if self._candidates is None:
            return self._least()
        waiting = [client for client in self._candidates if client.waiting]
        if not waiting:
            raise IndexError("no request waits")
        return min(waiting, key=lambda client: (client.counter, client.joined))

    def _least(self) -> _Client[Item]:
        """The waiting client with the least counter. Counters only grow, so an outdated entry of the heap is
        found at its top."""
        while self._heap:
            counter, joined, client = self._heap[0]
            if not client.waiting:
                heapq.heappop(self._heap)
                client.in_heap = False
            elif (counter, joined) != (client.counter, client.joined):
                heapq.heapreplace(self._heap, (client.counter, client.joined, client))
            else:
                return client
        raise IndexError("no request waits")

    def _push(self, client: _Client[Item]) -> None:
        if not client.in_heap:
            client.in_heap = True
            heapq.heappush(self._heap, (client.counter, client.joined, client))

    def _no_longer_aside(self, client: _Client[Item]) -> None:
        client.set_aside -= 1
        if client.set_aside == 0:
            del self._aside[client]

    def _leave_if_empty(self, client: _Client[Item]) -> None:
        if not client.queued:
            self._left_last = client

    def _charge(self, client: _Client[Item], price: float) -> float:
        charge = price / client.weight
        client.counter += charge
        return charge

    def _push_idle(self, client: _Client[Item]) -> None:
        if not client.in_idle_heap:
            client.in_idle_heap = True
            heapq.heappush(self._idle_heap, (client.counter, next(self._arrivals), client))

    def _forget_idle(self) -> None:
        """Forget clients without requests that are not ahead, and more of them where they are too many."""
        floor = self.floor()
        while self._idle_heap and (self._idle_heap[0][0] <= floor or self._idle > self._most_idle):
            counter, _, client = heapq.heappop(self._idle_heap)
            client.in_idle_heap = False
            if client.requests:
                continue
            if counter != client.counter:
                self._push_idle(client)
            else:
                self._idle -= 1
                del self._clients[client.name]
