"""What may be said about a run? Paragraphs of findings, worded as their intervals allow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flora_train.evaluation.report.formatting import (
    NOT_FINITE,
    count,
    interval,
    listed,
    number,
    percent,
    plural,
    share,
    shared_digits,
    verdict,
)


def summarise(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs of findings, computed from the figures and worded as their intervals allow: base, then methods."""
    adapters, judged = results["adapters"], results["results"]
    tasks = list(dict.fromkeys(a["task"] for a in adapters))
    steps = max((step for curve in results["curves"]["training"].values() for step, _ in curve), default=0)
    where = f"task {tasks[0]}" if len(tasks) == 1 else plural(len(tasks), "task")
    what = f"{plural(len(adapters), 'adapter')} on {where} {'was' if len(adapters) == 1 else 'were'} trained in one run on "
    what += f"{results['facts'].get('model', 'one base model')}" + (f", in {plural(steps, 'step')}." if steps else ".")
    return [
        f"{what} {_against_base(judged)}",
        *_between_methods(judged),
        *map(_of_programs, results["code"]),
        *_of_speech(results["speech"]),
    ]


def _of_programs(suite: Mapping[str, Any]) -> str:
    """What a suite's mean over languages, or its only language, says."""
    parts = suite["languages"] if len(suite["languages"]) == 1 else [suite["macro"]] if suite["macro"]["languages"] else []
    if not parts:
        return f"On the {suite['suite']} problems nothing could be compared: see what was not evaluated."
    part, k = parts[0], str(suite["k"][0])
    to_base = {d["a"]: d["pass_at"][k] for d in part["differences"] if d["b"] == "base"}
    values = {c["family"]: c["pass_at"][k]["value"] for c in part["contenders"]}
    where = f"in {part['name']}" if "name" in part else f"over {len(part['languages'])} languages"
    words = [
        f"{family} {share(value)}\u00a0%" + ("" if to_base[family]["excludes_zero"] else " (no clear difference to the base)")
        for family, value in values.items()
        if family in to_base
    ]
    return f"pass@{k} on the {suite['suite']} problems {where}: base {share(values['base'])}\u00a0%, {listed(words)}."


def _of_speech(speech: Mapping[str, Any] | None) -> list[str]:
    """In which languages each method makes clearly fewer errors than the base."""
    if speech is None:
        return []
    better: dict[str, list[str]] = {}
    for part in speech["languages"]:
        for d in part["differences"]:
            if d["b"] == "base":
                better.setdefault(d["a"], []).extend([part["task"]] * (verdict(d[part["metric"]]) == "better"))
    total = len(speech["languages"])
    words = [f"{family} in {listed(tasks, 6) if tasks else 'none'}" for family, tasks in better.items()]
    where = "the one language" if total == 1 else f"{total} languages"
    return [f"Of {where}, fewer words or characters are clearly wrong than with the base: {'; '.join(words)}."]


def _against_base(judged: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, list[str]] = {"better": [], "worse": [], "unclear": [], NOT_FINITE: []}
    for result in judged:
        for c in result["contenders"]:
            found[verdict(c["difference_to_base"])].append(f"{c['family']} on {result['task']}")
    total, better, level = sum(map(len, found.values())), len(found["better"]), percent(judged)
    if total == 1:
        difference, digits = judged[0]["contenders"][0]["difference_to_base"], shared_digits(judged)
        figures = f"{number(difference['value'], digits, '+')} bits per byte, {level} interval {interval(difference, digits)}"
        return {
            "better": f"It predicts held-out text better than the base model: {figures}.",
            "worse": f"It predicts held-out text worse than the base model: {figures}.",
            "unclear": f"There is no clear difference to the base model on held-out text: {figures}.",
            NOT_FINITE: "Its held-out loss is not finite, so it cannot be compared with the base model.",
        }[verdict(difference)]
    if better == total:
        who = f"On all {len(judged)} tasks every method" if len(judged) > 1 else "Every method"
        return f"{who} predicts held-out text better than the base model: no {level} interval of the difference reaches zero."
    parts = [f"{better or 'none'} {'predicts' if better < 2 else 'predict'} held-out text better than the base model"]
    if names := found["worse"]:
        parts.append(f"{len(names)} {'predicts' if len(names) == 1 else 'predict'} it worse ({listed(names, 4)})")
    if names := found["unclear"]:
        why = "one held-out example allows none" if _alone(judged) else f"the {level} interval includes zero"
        parts.append(f"for {len(names)} there is no clear difference, {why} ({listed(names, 4)})")
    if names := found[NOT_FINITE]:
        parts.append(f"{len(names)} cannot be judged, the held-out loss is not finite ({listed(names, 4)})")
    return f"Of {count(total)} adapters, {'; '.join(parts)}."


def _alone(judged: Sequence[Mapping[str, Any]]) -> bool:
    return all(result["examples"] == 1 for result in judged)


def _between_methods(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    best: dict[str, Mapping[str, Any]] = {}
    tied: list[str] = []
    for result in judged:
        finite = [c for c in result["contenders"] if verdict(c["difference_to_base"]) != NOT_FINITE]
        order = sorted(finite, key=lambda c: c["bits_per_byte"]["value"])
        if len(order) > 1:
            best[result["task"]] = order[0]
            pair = {c["family"] for c in order[:2]}
            lead = next(d["bits_per_byte"] for d in result["differences"] if {d["a"], d["b"]} == pair)
            tied += [] if lead["excludes_zero"] else [result["task"]]
    if not best:
        return []
    wins = Counter(c["family"] for c in best.values()).most_common()
    only = wins[0][0] if len(wins) == 1 else ""
    if len(best) <= 4:
        cases = _cases(best, shared_digits(judged), percent(judged), named=not only)
        sentence = f"The best method is {only + (' everywhere: ' if len(best) > 1 else ': ') if only else ''}{listed(cases)}."
    elif only:
        sentence = f"On all {len(best)} tasks with more than one method the best is {only}."
    else:
        sentence = f"Of {len(best)} tasks with more than one method, the best is {listed([f'{w} on {n}' for w, n in wins], 6)}."
    if tied:
        where = "" if len(best) == 1 else f" on {listed(tied, 4)}" if len(tied) < len(best) else " on any task"
        why = "one held-out example allows no interval" if _alone(judged) else "the interval includes zero"
        return [f"{sentence} The lead over the next method is not clear{where}: {why}."]
    where = {1: "", 2: " on both tasks"}.get(len(best), f" on all {len(best)} tasks")
    return [f"{sentence} The lead over the next method is clear{where}."]


def _cases(best: Mapping[str, Mapping[str, Any]], digits: int, level: str, named: bool) -> list[str]:
    cases: list[str] = []
    for task, c in best.items():
        difference = c["difference_to_base"]
        remarks = {"worse": ", still worse than the base", "unclear": ", not clearly different from the base"}
        figures = [number(difference["value"], digits, "+"), interval(difference, digits)]
        if not cases:
            figures = [f"{figures[0]} bits per byte", f"{level} interval {figures[1]}"]
        cases.append(
            f"{c['family'] + ' on ' if named else ''}{task} ({', '.join(figures)}{remarks.get(verdict(difference), '')})"
        )
    return cases
