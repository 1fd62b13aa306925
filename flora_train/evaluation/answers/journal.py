"""The journal of answers in the evaluation folder of a run, which stays there for readers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flora_train.config.json_format import JsonValue
from flora_train.runtime.journal import Journal

Key = tuple[str, str, int]
"""(adapter, task, example)"""


@dataclass(frozen=True)
class LoggedAnswer:
    """The answer of the base or of an adapter to one held-out prompt."""

    adapter: str
    task: str
    example: int
    """Number of the held-out example."""
    answer: str
    reference: str
    """The completion in the data."""
    ended: str
    """stop, end or length."""
    tokens: int
    """Number of tokens generated."""
    max_new_tokens: int
    prompt_sha: str
    """SHA-256 of prompt and reference."""
    adapter_sha: str
    """SHA-256 of the adapter's weights; empty for the base model."""

    @property
    def key(self) -> Key:
        return self.adapter, self.task, self.example


class AnswerLog(Journal[LoggedAnswer]):
    """The journal of answers. Those to other prompts, by other weights or with another limit are deleted."""

    def __init__(self, folder: Path) -> None:
        """folder: of a run's evaluation."""
        remedy = "move it away, and the answers are generated again"
        super().__init__(folder / "answers", LoggedAnswer, "answer", remedy)

    def known(
        self, settings: Mapping[str, JsonValue], origins: Mapping[Key, tuple[str, str, int]]
    ) -> set[Key]:
        """The keys of the answers in the journal.

        origins: key -> SHA-256 of its prompt and of its adapter, and largest number of tokens. Answers with
        another origin, and all answers if the settings differ, are deleted. Called on one process, before any
        process writes.
        """
        self.claim(settings, restart=True)
        entries = self.read()
        outdated = set()
        for key, entry in entries.items():
            origin = (entry.prompt_sha, entry.adapter_sha, entry.max_new_tokens)
            if origins.get(key, origin) != origin:
                outdated.add(key)
        if outdated:
            self.delete()
            self.claim(settings)
            writer = self.writer(0)
            for key, entry in entries.items():
                if key not in outdated:
                    writer.append(entry)
        return entries.keys() - outdated
