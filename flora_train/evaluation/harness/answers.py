"""The answers of all contenders to all requests, computed once and handed out per contender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Arguments = tuple[Any, ...]
"""Of one request: texts, and settings of generation."""
Requests = Mapping[str, Sequence[Arguments]]
"""Kind of request, such as `loglikelihood` -> the requests."""
Compute = Callable[[Requests, Sequence[str]], Mapping[str, Mapping[str, Sequence[Any]]]]
"""(requests, names of contenders) -> contender -> kind of request -> answers."""


class Answers:
    """Answers of contenders, from memory.

    compute: computes what is not in memory, which is only the case where a task makes other requests when it
    is asked again.
    """

    def __init__(self, requests: Requests, contenders: Sequence[str], compute: Compute) -> None:
        self._requests = {kind: list(items) for kind, items in requests.items()}
        self._compute = compute
        self._known = compute(self._requests, contenders)

    def of(self, contender: str, kind: str, requests: Sequence[Arguments]) -> list[Any]:
        """The answers of one contender to these requests."""
        requests = list(requests)
        if requests == self._requests.get(kind):
            return list(self._known[contender][kind])
        return list(self._compute({kind: requests}, [contender])[contender][kind])
