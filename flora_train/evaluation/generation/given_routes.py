"""Routes that a measurement gives a switch adapter, in place of those that its router chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from flora_train.adapters.bank import AdapterBank

Routes = Callable[[int], Sequence[Sequence[int]]]
"""The experts [T][k] of the next T tokens that a switch adapter computes."""


@contextmanager
def given_routes(bank: AdapterBank, routes: Routes) -> Iterator[None]:
    """Within this context, the tokens of the bank's switch adapters are sent to these experts.

    The router runs as always, so that its time is measured too, and gives the weights of the experts.

    Example: `with given_routes(bank, alternating_routes(8, every=16)): decoder.run(...)`
    """
    bank.router.given_routes = routes
    try:
        yield
    finally:
        bank.router.given_routes = None


def alternating_routes(count: int, *, every: int = 1, top_k: int = 1) -> Routes:
    """The routes (0, 1, ...), (1, 2, ...), ... of `top_k` of `count` experts in turn; each stays for `every`
    tokens, counted from the first token of the prompt."""
    done = 0

    def routes(tokens: int) -> list[list[int]]:
        nonlocal done
        first = [position // every for position in range(done, done + tokens)]
        done += tokens
        return [[(number + slot) % count for slot in range(top_k)] for number in first]

    return routes
