"""What does a reader get to see of a suite? One plain mapping (scores.json, and a part of report.json)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.json_format import read_object
from flora_train.config.schema import RunConfig
from flora_train.evaluation.code.completion_log import Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.code.programs.execute import STATUSES
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.scores import Scores
from flora_train.runtime.atomic import write_atomically

SCORES = "scores.json"
KEYS = {"language", "available", "prompts_sha", "contenders"}
"""Of every language in it."""


def read_summaries(folder: Path) -> list[dict[str, Any]]:
    """All suites that a run was evaluated on, by name."""
    return [read_summary(file.parent) for file in sorted(folder.glob(f"*/{SCORES}"))]


def read_summary(folder: Path) -> dict[str, Any]:
    """What an earlier call left there; without one, a summary of nothing."""
    file = folder / SCORES
    if not file.exists():
        return {"languages": []}
    summary = read_object(file, "delete it, and flora-train solve makes it again")
    parts = summary.get("languages")
    known = isinstance(parts, list) and all(isinstance(part, dict) and part.keys() >= KEYS for part in parts)
    if not known:
        raise user_error(str(file), None, "is damaged: delete it, and flora-train solve makes it again")
    return summary


def write_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """As `folder`/scores.json, whole or not at all."""
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / SCORES, lambda path: path.write_text(text, encoding="utf-8"))


def summarise(
    config: RunConfig,
    suite: Suite,
    known: Mapping[str, tuple[int, str]],
    contenders: Sequence[Contender],
    logged: Sequence[LoggedCompletion],
    records: Mapping[Key, Mapping[str, Any]],
    broken: Mapping[str, str],
    cases: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """known: language -> (its problems, their SHA-256); broken: language -> why it cannot be evaluated; cases: language -> problems
    that were won or lost.

    languages: per language every contender's pass@k, how its programs ended, suspicious passes and cut completions, all
    differences, paired by problem, and its cases; macro: means over languages, by family; not_evaluated: language and reason."""
    options = config.evaluation
    scores = Scores(records.values(), options.bootstrap_samples, options.confidence, config.seed)
    judged = [entry for entry in logged if entry.key in records]
    seconds = {key[1]: record["cpu_seconds"] for key, record in records.items()}
    return {
        "suite": suite.name,
        "source": suite.source,
        "n": options.num_samples,
        "k": list(options.pass_at_k),
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_new_tokens": options.max_new_tokens,
        "seed": config.seed,
        "confidence": options.confidence,
        "sandbox": options.sandbox,
        "completions": len(judged),
        "tokens": sum(entry.tokens for entry in judged),
        "languages": [
            {
                **_language(config, language, known[language], there, judged, scores),
                "cases": cases.get(language, []),
                "cpu_seconds": seconds[language],
            }
            for language in known
            if (there := [c for c in contenders if (c.name, language) in scores.cells])
        ],
        "macro": _macro(contenders, scores, options.pass_at_k),
        "not_evaluated": [
            {"language": language, "reason": reason}
            for language, reason in sorted(broken.items())
            if language not in {key[1] for key in records}
        ],
    }


def _language(
    config: RunConfig,
    language: str,
    known: tuple[int, str],
    contenders: Sequence[Contender],
    logged: Iterable[LoggedCompletion],
    scores: Scores,
) -> dict[str, Any]:
    ks = config.evaluation.pass_at_k
    cut = [entry.adapter for entry in logged if entry.language == language and entry.ended == "length"]
    return {
        "language": language,
        "name": load_languages()[language].name,
        "problems": max(len(scores.problems((c.name, language))) for c in contenders),
        "available": known[0],
        "prompts_sha": known[1],
        "contenders": [
            {
                "name": c.name,
                "family": c.family,
                "n": scores.n((c.name, language)),
                "pass_at": {str(k): scores.pass_at((c.name, language), k).record() for k in ks},
                "ended": {status: scores.ended[c.name, language][status] for status in STATUSES},
                "suspicious": scores.suspicious[c.name, language],
                "cut": cut.count(c.name),
            }
            for c in contenders
        ],
        "differences": [
            {
                "a": a.family,
                "b": b.family,
                "pass_at": {str(k): scores.difference(a.name, b.name, language, k).record() for k in ks},
            }
            for a, b in _pairs(contenders)
        ],
    }


def _macro(contenders: Sequence[Contender], scores: Scores, ks: Sequence[int]) -> dict[str, Any]:
    """Means over languages in which all families that are shown stand, so that all are means of the same."""
    adapters: dict[str, dict[str, str]] = {}
    for c in contenders:
        mine = adapters.setdefault(c.family, {})
        mine |= {language: c.name for language in c.languages if (c.name, language) in scores.cells}
    shared = _widest({family: frozenset(mine) for family, mine in adapters.items()})
    if not shared:
        return {"languages": [], "contenders": [], "differences": []}
    of = {family: {key: mine[key] for key in shared} for family, mine in adapters.items() if set(shared) <= set(mine)}
    families = [Contender(family, family, -1, (), "") for family in of]
    return {
        "languages": shared,
        "contenders": [
            {"family": family, "pass_at": {str(k): scores.macro(mine, k).record() for k in ks}} for family, mine in of.items()
        ],
        "differences": [
            {
                "a": a.family,
                "b": b.family,
                "pass_at": {str(k): scores.macro_difference(of[a.family], of[b.family], k).record() for k in ks},
            }
            for a, b in _pairs(families)
        ],
    }


def _widest(languages_of: Mapping[str, frozenset[str]]) -> list[str]:
    """The languages of one family for which families times languages is largest: some have more, some less than the others."""
    sets = sorted(set(languages_of.values()), key=sorted)
    best = max(sets, key=lambda s: len(s) * sum(s <= other for other in languages_of.values()), default=frozenset())
    return sorted(best)


def _pairs(contenders: Sequence[Contender]) -> list[tuple[Contender, Contender]]:
    """Everybody against the base, and each against those after it."""
    base = [c for c in contenders if c.family == "base"]
    others = [c for c in contenders if c.family != "base"]
    return [(a, b) for a in others for b in base] + [(a, b) for i, a in enumerate(others) for b in others[i + 1 :]]
