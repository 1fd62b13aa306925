"""Answers are computed once for all contenders; other requests are computed for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.evaluation.harness.answers import Answers, Requests


def test_answers_come_from_memory() -> None:
    calls: list[tuple[list[str], list[str]]] = []

    def compute(requests: Requests, names: Sequence[str]) -> Mapping[str, Mapping[str, Sequence[Any]]]:
        calls.append((sorted(requests), list(names)))
        return {
            name: {kind: [(name, *item) for item in items] for kind, items in requests.items()}
            for name in names
        }

    requests = {"loglikelihood": [("a", "b"), ("a", "c")], "generate_until": [("a", {"until": ["x"]})]}
    answers = Answers(requests, ["base", "lora"], compute)
    assert calls == [(["generate_until", "loglikelihood"], ["base", "lora"])]
    assert answers.of("lora", "loglikelihood", [("a", "b"), ("a", "c")]) == [
        ("lora", "a", "b"),
        ("lora", "a", "c"),
    ]
    assert answers.of("base", "generate_until", [("a", {"until": ["x"]})]) == [
        ("base", "a", {"until": ["x"]})
    ]
    assert len(calls) == 1
    assert answers.of("base", "loglikelihood", [("a", "c")]) == [("base", "a", "c")]
    assert calls[1:] == [(["loglikelihood"], ["base"])]
