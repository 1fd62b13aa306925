"""Which problem did an adapter win over the base, and which did it lose? One of each per language, with both programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from flora_train.evaluation.code.completion_log import Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.problem import Problem


def wins_and_losses(
    problems: Mapping[str, Problem],
    language: str,
    contenders: Iterable[Contender],
    logged: Iterable[LoggedCompletion],
    records: Mapping[Key, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """The problem where the share of samples that pass rose most over the base, and the one where it fell most, over all
    adapters: kind (won or lost), family, problem, prompt, and of both sides a completion with its status and how many samples pass.
    Ties go to the first contender and the first problem."""
    samples: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for entry in logged:
        if entry.language == language and entry.key in records and entry.name in problems:
            samples[entry.adapter, entry.name].append((entry.completion, records[entry.key]["status"]))
    base = {name for adapter, name in samples if adapter == "base"}
    gains = [
        (_passing(samples[c.name, name]) - _passing(samples["base", name]), c, name)
        for c in contenders
        if c.name != "base"
        for name in problems
        if name in base and (c.name, name) in samples
    ]
    found = []
    for kind, sign in (("won", 1), ("lost", -1)):
        gain, contender, name = max(gains, key=lambda row: sign * row[0], default=(0.0, None, ""))
        if contender is not None and sign * gain > 0:
            sides = {"base": (samples["base", name], kind == "lost"), "adapter": (samples[contender.name, name], kind == "won")}
            found.append(
                {
                    "kind": kind,
                    "family": contender.family,
                    "problem": name,
                    "prompt": problems[name].prompt,
                    **{who: _shown(problems[name], mine, passes) for who, (mine, passes) in sides.items()},
                }
            )
    return found


def _passing(samples: list[tuple[str, str]]) -> float:
    return sum(status == "OK" for _, status in samples) / len(samples)


def _shown(problem: Problem, samples: list[tuple[str, str]], passes: bool) -> dict[str, Any]:
    """The first sample that passes, or that does not."""
    completion, status = next(sample for sample in samples if (sample[1] == "OK") == passes)
    passed = sum(status == "OK" for _, status in samples)
    return {"completion": problem.cut(completion), "status": status, "passed": passed, "samples": len(samples)}
