"""Where do a run's completions stand? In a log that only grows, which `flora-train execute` reads, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flora_train.runtime.journal import Journal

Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class LoggedCompletion:
    """One sample as it was generated. prompt_sha: of the whole problem; adapter_sha: of the adapter's numbers ("" the base);
    ended: stop, end or length; tokens: that were computed."""

    adapter: str
    language: str
    name: str
    sample: int
    completion: str
    ended: str
    tokens: int
    prompt_sha: str
    adapter_sha: str

    @property
    def key(self) -> Key:
        return self.adapter, self.language, self.name, self.sample


class CompletionLog(Journal[LoggedCompletion]):
    """The folder `path` of a suite: completions, how they were made, and the verdicts on them."""

    def __init__(self, path: Path) -> None:
        another = "choose another folder (flora-train solve RUN out=FOLDER), or move this one away"
        super().__init__(path, LoggedCompletion, "completion", another)
        self.verdicts = path / "verdicts.jsonl"
