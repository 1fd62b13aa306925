"""CompletionLog: the journal of a suite's completions, which `flora-train execute` also reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flora_train.runtime.journal import Journal

Key = tuple[str, str, str, int]
"""(adapter, language, name, sample)"""


@dataclass(frozen=True)
class LoggedCompletion:
    """One sample as it was generated."""

    adapter: str
    language: str
    name: str
    sample: int
    completion: str
    ended: str
    """stop, end or length."""
    tokens: int
    """Number of tokens generated."""
    prompt_sha: str
    """SHA-256 of the whole problem."""
    adapter_sha: str
    """SHA-256 of the adapter's weights; empty for the base model."""

    @property
    def key(self) -> Key:
        return self.adapter, self.language, self.name, self.sample


class CompletionLog(Journal[LoggedCompletion]):
    """The folder of a suite: completions, the settings that they were made with, and the verdicts on them."""

    def __init__(self, path: Path) -> None:
        remedy = "choose another folder (flora-train solve RUN --out FOLDER), or move this one away"
        super().__init__(path, LoggedCompletion, "completion", remedy)
        self.verdicts = path / "verdicts.jsonl"
        self.scores = path / "scores.json"

    def delete(self) -> None:
        """Delete the completions with the verdicts and scores that were made from them."""
        for file in (self.verdicts, self.scores):
            file.unlink(missing_ok=True)
        super().delete()
