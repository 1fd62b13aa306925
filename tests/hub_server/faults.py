"""Failures of the hub: which requests fail, how, and how many times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

TRANSIENT_KINDS = ("429", "500", "502", "503", "504")
"""Statuses with a Retry-After header."""
KINDS = {
    **dict.fromkeys(TRANSIENT_KINDS, "an answer with this status, and Retry-After"),
    "refuse": "the connection is closed without an answer",
    "drop": "the connection is closed in the middle of the body that was promised",
    "resize": "a file of another size and another ETag than the hub said before",
    "corrupt": "a file of the size and ETag that the hub said before, with another content",
    "commit": "a new commit arrives before the answer, in which the requested file is cut in half",
    "redirect": "a redirect to the same path with an absolute URL",
    "relative redirect": "a redirect to the same path with a relative URL",
    "login": "401: the repository is gated, as without a token",
    "terms": "403: the repository is gated, and its terms were not accepted",
    "missing": "404: there is no such repository",
    "slow": "the answer comes after a second",
}
"""Kind of fault -> what happens."""


COMMIT = "?" * 40
"""Pattern of a commit: of a reader that has resolved the branch before."""


@dataclass
class Fault:
    """A failure of requests whose path matches the pattern."""

    kind: str
    """One of KINDS."""
    pattern: str = "*"
    """Glob of the path: of `/datasets/ORG/NAME/resolve/REVISION/FILE`, `/api/...`, or `/cdn/...`, which holds
    the same parts."""
    times: int = 1
    """How many times it is injected."""
    methods: tuple[str, ...] = ("GET", "HEAD")
    each: bool = False
    """Whether `times` counts for each path rather than for all."""
    after: int = 0
    """Requests that pass before the first failure, counted like `times`."""
    retry_after: str | None = "1"
    """Retry-After of statuses: seconds, or an HTTP date."""
    seen: Counter[str] = field(default_factory=Counter)
    """Path (or all) -> matching requests until now."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown fault {self.kind}: one of {', '.join(KINDS)}")

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request fails. It counts the request."""
        if method not in self.methods or not fnmatchcase(path, self.pattern):
            return False
        key = path if self.each else "all"
        self.seen[key] += 1
        return self.after < self.seen[key] <= self.after + self.times


def all_faults() -> list[Fault]:
    """Every fault that a reader survives."""
    return [
        Fault("429", "/api/*", times=2),
        Fault("503", "/api/*", times=2, after=1),
        Fault("429", "*/resolve/*", times=2, after=1),
        Fault("503", "*/resolve/*", times=3, after=3),
        Fault("refuse", "*/resolve/*", after=4),
        Fault("503", "*/tree/*", times=2),
        Fault("503", "/cdn/*", times=2, methods=("GET",), after=1),
        Fault("drop", "/cdn/*", each=True, methods=("GET",)),
        Fault("resize", "/cdn/*.parquet", methods=("GET",), after=3),
        Fault("corrupt", "/cdn/*.parquet", methods=("GET",), after=5),
        Fault("commit", f"/datasets/*/resolve/{COMMIT}/*.parquet", each=True),
        Fault("redirect", "*/resolve/*", times=2, after=6),
        Fault("relative redirect", "*/resolve/*", times=2, after=7),
    ]
