"""The scores of a suite of programming problems: scores.json, and a part of report.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flora_train.adapters.spec import AdapterSpec, expand
from flora_train.config.schema import RunConfig
from flora_train.evaluation.bootstrap import compared_pairs
from flora_train.evaluation.code.completion_log import Key, LoggedCompletion
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.problems.suites import Suite
from flora_train.evaluation.code.programs.execute import STATUSES
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.verdicts import VerdictRecord
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
from flora_train.evaluation.code.scores import Cell, Scores
from flora_train.evaluation.joined_families import joined_families
from flora_train.evaluation.result_model import Interval, read_results
from flora_train.evaluation.seeds import SeedGroup, over_seeds, seed_groups
from flora_train.runtime.atomic import write_atomically

SCORES = "scores.json"


def read_summaries(folder: Path) -> tuple[CodeSuite, ...]:
    """All suites that a run was evaluated on, by name."""
    summaries = (read_summary(file.parent) for file in sorted(folder.glob(f"*/{SCORES}")))
    return tuple(summary for summary in summaries if summary is not None)


def read_summary(folder: Path) -> CodeSuite | None:
    """The scores that an earlier evaluation wrote; None if there are none. Raises UserError if they are
    damaged."""
    file = folder / SCORES
    if not file.exists():
        return None
    return read_results(file, CodeSuite, "delete it, and flora-train solve writes it again")


def write_summary(summary: CodeSuite, folder: Path) -> None:
    """Write `folder`/scores.json atomically."""
    text = json.dumps(summary.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
    write_atomically(folder / SCORES, lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class SuiteRecords:
    """Everything that the scores of a suite are computed from."""

    suite: Suite
    known: Mapping[str, tuple[int, str]]
    """Language -> (number of its problems, their SHA-256)."""
    contenders: Sequence[Contender]
    logged: Sequence[LoggedCompletion]
    records: Mapping[Key, VerdictRecord]
    """Verdict records to be scored."""
    broken: Mapping[str, str]
    """Language -> why it cannot be evaluated."""
    decided: Mapping[str, Sequence[DecidedProblem]]
    """Language -> problems that were won or lost."""


def summarise(config: RunConfig, given: SuiteRecords) -> CodeSuite:
    """Score a suite."""
    options = config.evaluation
    specs = expand(config)
    groups = seed_groups(specs)
    scores = Scores(
        given.records.values(),
        resamples=options.bootstrap_samples,
        confidence=options.confidence,
        seed=config.seed,
        seeds={group.name: [specs[i].name for i in group.members] for group in groups},
    )
    executed = [entry for entry in given.logged if entry.key in given.records]
    cut = Counter((entry.adapter, entry.language) for entry in executed if entry.ended == "length")
    seconds = {key[1]: record["cpu_seconds"] for key, record in given.records.items()}
    languages = []
    names = {key: entry.name for key, entry in load_languages().items()}
    for language in given.known:
        scored = [contender for contender in given.contenders if scores.has((contender.name, language))]
        means = _means(groups, specs, scored)
        if scored:
            available, prompts_sha = given.known[language]
            languages.append(
                LanguageScores(
                    language=language,
                    name=names[language],
                    problems=max(len(scores.problems((contender.name, language))) for contender in scored),
                    available=available,
                    prompts_sha=prompts_sha,
                    contenders=[_score(c, language, scores, cut=cut, ks=options.pass_at_k) for c in scored],
                    over_seeds=[_score(c, language, scores, cut=cut, ks=options.pass_at_k) for c in means],
                    differences=_differences(
                        _in_order(scored, means, scores), language, scores, ks=options.pass_at_k
                    ),
                    cpu_seconds=seconds[language],
                    wins_and_losses=given.decided.get(language, ()),
                )
            )
    return CodeSuite(
        suite=given.suite.name,
        source=given.suite.source,
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
        macro=_macro(
            [*given.contenders, *_means(groups, specs, given.contenders)],
            scores,
            options.pass_at_k,
            joined=_joined(specs),
        ),
        not_evaluated=_not_evaluated(given),
    )


def _means(
    groups: Sequence[SeedGroup], specs: Sequence[AdapterSpec], contenders: Sequence[Contender]
) -> list[Contender]:
    """The mean over seeds of each group whose adapters are all among the contenders, as a contender."""
    by_name = {contender.name: contender for contender in contenders}
    means = []
    for group in groups:
        names = [specs[i].name for i in group.members]
        if by_name.keys() >= set(names):
            first = by_name[names[0]]
            means.append(Contender(group.name, group.family, first.adapter, first.languages, ""))
    return means


def _in_order(contenders: Sequence[Contender], means: Sequence[Contender], scores: Scores) -> list[Contender]:
    """The contenders with each mean before its first seed."""
    before = {scores.seeds[mean.name][0]: mean for mean in means}
    ordered = []
    for contender in contenders:
        if contender.name in before:
            ordered.append(before[contender.name])
        ordered.append(contender)
    return ordered


def _not_evaluated(given: SuiteRecords) -> list[NotEvaluated]:
    executed = {key[1] for key in given.records}
    reasons = sorted(given.broken.items())
    return [
        NotEvaluated(language=language, reason=reason)
        for language, reason in reasons
        if language not in executed
    ]


def _score(
    contender: Contender,
    language: str,
    scores: Scores,
    *,
    cut: Mapping[tuple[str, str], int],
    ks: Sequence[int],
) -> CodeScore:
    cell = contender.name, language
    members = scores.seeds.get(contender.name, (contender.name,))
    ended = scores.count_ended(cell)
    return CodeScore(
        name=contender.name,
        family=contender.family,
        samples=scores.num_samples(cell),
        pass_at={k: _pass_at(scores, cell, k) for k in ks},
        ended={status: ended[status] for status in STATUSES},
        suspicious=scores.count_early_exits(cell),
        cut=sum(cut.get((member, language), 0) for member in members),
    )


def _pass_at(scores: Scores, cell: Cell, k: int) -> Interval:
    """pass@k; of a mean over seeds with their deviation."""
    name, language = cell
    interval = scores.pass_at(cell, k).interval()
    if name not in scores.seeds:
        return interval
    members = [(member, language) for member in scores.seeds[name]]
    return over_seeds(interval, [scores.pass_at(member, k).value for member in members])


def _differences(
    contenders: Sequence[Contender], language: str, scores: Scores, *, ks: Sequence[int]
) -> list[CodeDifference]:
    rates = {c.name: scores.pass_at((c.name, language), min(ks)).value for c in contenders}
    families = {contender.name: contender.family for contender in contenders}
    differences = []
    for a, b in _pairs(rates, seeds=_single_seeds(scores)):
        pass_at = {k: scores.difference(a, b, language=language, k=k).interval() for k in ks}
        differences.append(CodeDifference(first=families[a], second=families[b], pass_at=pass_at))
    return differences


def _single_seeds(scores: Scores) -> set[str]:
    """The adapters that are compared as a part of a mean over seeds only."""
    return {member for members in scores.seeds.values() for member in members}


def _joined(specs: Sequence[AdapterSpec]) -> dict[str, str]:
    """Family -> its name in means over languages, where that is not its own."""
    return joined_families(
        (spec.seeds_of or spec.family, spec.task, (spec.method, spec.offset, spec.lr)) for spec in specs
    )


def _macro(
    contenders: Sequence[Contender], scores: Scores, ks: Sequence[int], *, joined: Mapping[str, str]
) -> MacroScores:
    """Means over the languages that all families shown have in common. joined: families that are shown under
    one name."""
    adapters: dict[str, dict[str, str]] = {}
    for contender in contenders:
        scored = {key: contender.name for key in contender.languages if scores.has((contender.name, key))}
        name = joined.get(contender.family, contender.family)
        adapters.setdefault(name, {}).update(scored)
    single = _single_seeds(scores)
    seeds = {family for family, names in adapters.items() if single.intersection(names.values())}
    compared = {family: frozenset(names) for family, names in adapters.items() if family not in seeds}
    shared = _widest(compared)
    if not shared:
        return MacroScores(languages=(), contenders=(), differences=())
    names_of = {}
    for family, names in adapters.items():
        if set(shared) <= set(names):
            names_of[family] = {key: names[key] for key in shared}
    rates = {}
    for family, names in names_of.items():
        rates[family] = PassRates(family=family, pass_at={k: _macro_rate(scores, names, k) for k in ks})
    means = [family for family, names in names_of.items() if scores.seeds.keys() & set(names.values())]
    values = {family: scores.macro(names, min(ks)).value for family, names in names_of.items()}
    differences = []
    for a, b in _pairs(values, seeds):
        pass_at = {k: scores.macro_difference(names_of[a], names_of[b], k).interval() for k in ks}
        differences.append(CodeDifference(first=a, second=b, pass_at=pass_at))
    return MacroScores(
        languages=shared,
        contenders=[rate for family, rate in rates.items() if family not in means],
        over_seeds=[rates[family] for family in means],
        differences=differences,
    )


def _macro_rate(scores: Scores, adapters: Mapping[str, str], k: int) -> Interval:
    """The mean over languages; of means over seeds with the deviation of the seeds' means over languages.

    adapters: language -> adapter, or mean over seeds.
    """
    interval = scores.macro(adapters, k).interval()
    groups = {language: scores.seeds.get(name, ()) for language, name in adapters.items()}
    counts = {len(group) for group in groups.values()}
    if len(counts) > 1 or 0 in counts:
        return interval
    values = []
    for seed in range(counts.pop()):
        of_seed = {language: group[seed] for language, group in groups.items()}
        values.append(scores.macro(of_seed, k).value)
    return over_seeds(interval, values)


def _widest(languages_of: Mapping[str, frozenset[str]]) -> list[str]:
    """The languages of one family, chosen so that families times languages is largest."""

    widest: frozenset[str] = frozenset()
    largest = 0
    for languages in sorted(set(languages_of.values()), key=sorted):
        size = len(languages) * sum(languages <= other for other in languages_of.values())
        if size > largest:
            widest, largest = languages, size
    return sorted(widest)


def _pairs(rates: Mapping[str, float], seeds: Collection[str] = ()) -> list[tuple[str, str]]:
    """Each contender with the base, then each pair of contenders; of many contenders, each with the best.

    rates: contender -> pass@k; the base model is "base". seeds: contenders that only their mean is paired
    for.
    """
    contenders = [contender for contender in rates if contender != "base"]
    with_base = [(contender, "base") for contender in contenders if "base" in rates]
    compared = [contender for contender in contenders if contender not in seeds]
    best = max(compared, key=lambda contender: rates[contender], default=None)
    return [*with_base, *compared_pairs(compared, best)]
