"""The scores of a suite of programming problems: scores.json, and a part of report.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

from flora_train.config.schema import RunConfig
from flora_train.evaluation.code.completion_log import Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.code.programs.execute import STATUSES
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.score_types import (
    CodeDifference,
    CodeScore,
    CodeSuite,
    DecidedProblem,
    LanguageScores,
    MacroScores,
    NotEvaluated,
    PassRates,
)
from flora_train.evaluation.code.scores import Scores
from flora_train.evaluation.result_model import read_results
from flora_train.runtime.atomic import write_atomically

SCORES = "scores.json"


def read_summaries(folder: Path) -> tuple[CodeSuite, ...]:
    """All suites that a run was evaluated on, by name."""
    summaries = (read_summary(file.parent) for file in sorted(folder.glob(f"*/{SCORES}")))
    return tuple(summary for summary in summaries if summary is not None)


def read_summary(folder: Path) -> CodeSuite | None:
    """The scores that an earlier evaluation wrote; None if there are none. Raises UserError if they are damaged."""
    file = folder / SCORES
    if not file.exists():
        return None
    return read_results(file, CodeSuite, "delete it, and flora-train solve writes it anew")


def write_summary(summary: CodeSuite, folder: Path) -> None:
    """Write `folder`/scores.json atomically."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / SCORES, lambda path: path.write_text(text, encoding="utf-8"))


def summarise(
    config: RunConfig,
    suite: Suite,
    known: Mapping[str, tuple[int, str]],
    contenders: Sequence[Contender],
    logged: Sequence[LoggedCompletion],
    records: Mapping[Key, Mapping[str, Any]],
    broken: Mapping[str, str],
    decided: Mapping[str, Sequence[DecidedProblem]],
) -> CodeSuite:
    """Score the verdicts in `records`.

    known: language -> (number of its problems, their SHA-256); broken: language -> why it cannot be evaluated;
    decided: language -> problems that were won or lost.
    """
    options = config.evaluation
    scores = Scores(records.values(), options.bootstrap_samples, options.confidence, config.seed)
    executed = [entry for entry in logged if entry.key in records]
    seconds = {key[1]: record["cpu_seconds"] for key, record in records.items()}
    languages = []
    for language in known:
        scored = [contender for contender in contenders if (contender.name, language) in scores.cells]
        if scored:
            cut = [entry.adapter for entry in executed if entry.language == language and entry.ended == "length"]
            available, prompts_sha = known[language]
            languages.append(
                LanguageScores(
                    language=language,
                    name=load_languages()[language].name,
                    problems=max(len(scores.problems((contender.name, language))) for contender in scored),
                    available=available,
                    prompts_sha=prompts_sha,
                    contenders=[_score(c, language, cut.count(c.name), scores, options.pass_at_k) for c in scored],
                    differences=_differences(scored, language, scores, options.pass_at_k),
                    cpu_seconds=seconds[language],
                    wins_and_losses=decided.get(language, ()),
                )
            )
    executed_languages = {key[1] for key in records}
    return CodeSuite(
        suite=suite.name,
        source=suite.source,
        num_samples=options.num_samples,
        pass_at_k=options.pass_at_k,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=config.seed,
        confidence=options.confidence,
        sandbox=options.sandbox,
        completions=len(executed),
        tokens=sum(entry.tokens for entry in executed),
        languages=languages,
        macro=_macro(contenders, scores, options.pass_at_k),
        not_evaluated=[
            NotEvaluated(language=language, reason=reason)
            for language, reason in sorted(broken.items())
            if language not in executed_languages
        ],
    )


def _score(contender: Contender, language: str, cut: int, scores: Scores, ks: Sequence[int]) -> CodeScore:
    cell = contender.name, language
    return CodeScore(
        name=contender.name,
        family=contender.family,
        samples=scores.n(cell),
        pass_at={k: scores.pass_at(cell, k).interval() for k in ks},
        ended={status: scores.ended[cell][status] for status in STATUSES},
        suspicious=scores.suspicious[cell],
        cut=cut,
    )


def _differences(contenders: Sequence[Contender], language: str, scores: Scores, ks: Sequence[int]) -> list[CodeDifference]:
    differences = []
    for a, b in _pairs(contenders):
        pass_at = {k: scores.difference(a.name, b.name, language, k).interval() for k in ks}
        differences.append(CodeDifference(first=a.family, second=b.family, pass_at=pass_at))
    return differences


def _macro(contenders: Sequence[Contender], scores: Scores, ks: Sequence[int]) -> MacroScores:
    """Means over the languages that all families shown have in common."""
    adapters: dict[str, dict[str, str]] = {}
    for contender in contenders:
        scored = {key: contender.name for key in contender.languages if (contender.name, key) in scores.cells}
        adapters.setdefault(contender.family, {}).update(scored)
    shared = _widest({family: frozenset(names) for family, names in adapters.items()})
    if not shared:
        return MacroScores(languages=(), contenders=(), differences=())
    shown = {family: names for family, names in adapters.items() if set(shared) <= set(names)}
    names_of = {family: {key: names[key] for key in shared} for family, names in shown.items()}
    means = []
    for family, names in names_of.items():
        means.append(PassRates(family=family, pass_at={k: scores.macro(names, k).interval() for k in ks}))
    differences = []
    for a, b in _pairs([Contender(family, family, -1, (), "") for family in names_of]):
        pass_at = {k: scores.macro_difference(names_of[a.family], names_of[b.family], k).interval() for k in ks}
        differences.append(CodeDifference(first=a.family, second=b.family, pass_at=pass_at))
    return MacroScores(languages=shared, contenders=means, differences=differences)


def _widest(languages_of: Mapping[str, frozenset[str]]) -> list[str]:
    """The languages of one family, chosen so that families times languages is largest."""
    sets = sorted(set(languages_of.values()), key=sorted)
    best = max(sets, key=lambda s: len(s) * sum(s <= other for other in languages_of.values()), default=frozenset())
    return sorted(best)


def _pairs(contenders: Sequence[Contender]) -> list[tuple[Contender, Contender]]:
    """Each adapter with the base, then each pair of adapters."""
    base = [contender for contender in contenders if contender.family == "base"]
    others = [contender for contender in contenders if contender.family != "base"]
    return [*product(others, base), *combinations(others, 2)]
